"""Work over the processes of a cluster, whose nodes see the same files: Ray, or whatever else.

A plan is a list of leaves, each of which gives the same bytes wherever it is made. They are cut
into *units* (`units`), and an `Executor` has each of them done somewhere, once or several times.
What is to be done is a function of a module, and plain data that it plans from anew (`shared`):
ingredients travel as paths, and what is found there is compared. Which unit is done by whom, in
which order and how often changes no byte.

Imports the engine and what is below it; `streamsoup.output` and `streamsoup.methods` say what is
done with a unit. Nothing here knows a method, and `ray` is imported once it is asked for.
"""
