"""The core: plan the whole pass from headers, then stream blocks of all ingredients through a rule.

May import the plain words (`errors`, `sizes`, `tensors`, `recipe`, `options`), `system`, `formats`
and `kernels`. What must not change: a plan is pure data made before the first weight is read; the
result does not depend on threads, blocks, budgets or the way of reading; memory stays within the
planned bound.
"""
