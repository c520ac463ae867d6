"""Training on the device, from texts to a model that loads.

`config` (every setting once), `sources` (files to records), `corpus` (records to tokens on disk),
`streams` (tokens to segments of rows), `step` (one step of the optimiser), `checkpoint`, `report`
and `loop`, which puts them together.
"""
