"""Workers, pipeline, collectives and sampler: what carries out the actions of the scheduler."""
