"""Describe weights, and choose among them. Nothing here knows factors.

In reading order:

* ``numbers``: checks of numbers that users pass.
* ``quantized``: weights of integers and scales.
* ``axes``: layouts, one letter per axis: ``b``, ``i`` or ``o``.
* ``paths``: names for the leaves of a tree.
* ``ranges``: parts of a weight, ``kernel[:, 0:768]``.
* ``layouts``: the use that a function makes of each weight, as ``layout_of`` finds it.
* ``conventions``: layouts and kinds that follow from names.
* ``target``: one chosen weight as a matrix, and PRNG keys for it.
* ``selector``: patterns over paths. ``layers``: some layers. ``choose``: both, and biases.
* ``plan``: everything that ``lorafy`` will adapt, checked.
"""
