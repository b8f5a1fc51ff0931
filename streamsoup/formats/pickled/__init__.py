"""Checkpoints that PyTorch pickled, read without running anything in them.

``torch.save`` writes a zip archive: ``data.pkl``, a program that builds the state dict, and one
member for each storage, whose bytes are those of a tensor. The program is never run by Python:

* `opcodes` goes through it with an interpreter of its own, which has no way to import or call
  anything, and counts the memory that it takes before it takes it;
* `descriptions` is the list of what may stand in it, and what is built instead: which tensors there
  are, of which dtype and shape, in which storage;
* `trees` finds the weights among what a trainer saves beside them.

The rest reads bytes: `archive` the zip directory, strictly; `places` where tensors lie; `strided`
ranges of tensors that do not lie in order; `checksums` the CRCs of the archive, along with the
pass. `saved` opens files of ``torch.save``, `distributed` folders of
``torch.distributed.checkpoint``.
"""
