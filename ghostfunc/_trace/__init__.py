"""Where parameters meet samples.

The first call runs the model three times on two or three samples and finds, for every op that meets
a parameter, which rows belong to which sample. The result is a `Trace`; it is remembered with the
model function, and every later run checks that it still holds.

Read: layout, tracked, watch, trace, record, probe, make, fitting.
"""
