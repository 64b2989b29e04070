"""Everything that knows diffusers: the switch on a model, its hooks, what is computed once, the processors."""
