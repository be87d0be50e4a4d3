"""``lora(fn)``: read the function's equations, and add the low-rank path beside each weight.

In reading order:

* ``origin``: where an array comes from; ``lazy``: a weight that is not read yet.
* ``labelled``: products of arrays with labelled axes.
* ``delta``: an update ``scale * a b`` under all that happened to its weight; ``lora_array``: a
  weight and its updates; ``dora``: the gains of its columns.
* ``use``: one use of a weight; ``context``: what is known while equations are read.
* ``rule``: the table of rules; ``rules``: one rule a primitive, in families.
* ``regroup``: axes that are split and joined; ``interpret``: equation by equation.
* ``call``: the arguments, traced; ``lora``: the transformation.
* ``discover``: ``layout_of``; ``report``: uses and costs.
"""
