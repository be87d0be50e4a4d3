"""The interpreter: a jaxpr evaluated on weights and their low-rank deltas.

In reading order: ``_value`` (what a weight is meanwhile), ``_rules`` (the table, and what happens
without a rule), ``_dot`` and ``_move`` (rules), ``_interpret`` (the loop), ``_control`` (rules for
control flow, which call the loop), ``_lora`` (the public transform).
"""
