"""Where parameters meet samples.

The first call traces the model: it runs it three times on two or three samples. The result is a
`Trace`: for every op that meets a parameter, which rows belong to which sample. It is remembered
with the model function, and every later run checks that it still holds.

    watch         the mode of every run: it sees each torch call and knows tracked tensors
    record        runs 1 and 2: two samples, then three
    beside_fewer  what three samples show beside two, call by call: four questions
    movement      whether an op moves rows from sample to sample, whatever the numbers are
    probe         run 3: one loss is pulled back at a time; rows with a cotangent are its sample's
    sample_axis   finds the axis that holds samples, from what these runs show
    make          the three runs, one after the other
    fitting       the trace that fits a batch: one of those remembered, or one that is made

Read: layout, sample_axis, tracked, watch, trace, record, beside_fewer, probe, make, fitting.
"""
