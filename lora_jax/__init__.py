"""LoRA for any pure JAX function over a parameter pytree.

::

    lora_params = lora_jax.lorafy(params, rank=8)    # frozen base + trainable factors
    apply = lora_jax.lora(model.apply)               # the same function, over split parameters
    tx = lora_jax.optimizer(optax.adamw(3e-4))       # moves the factors only
    params = lora_jax.merge(lora_params)             # plain parameters again
"""

from lora_jax import init as init
from lora_jax._arithmetic import linear_in_factors as linear_in_factors
from lora_jax._arrow import arrow as arrow
from lora_jax._bank import AdapterBank as AdapterBank
from lora_jax._convert import to_plain as to_plain
from lora_jax._extract import extract as extract
from lora_jax._layout import Layouts as Layouts
from lora_jax._lorafy import lorafy as lorafy
from lora_jax._merge import merge as merge
from lora_jax._merge import switch as switch
from lora_jax._merge import unmerge as unmerge
from lora_jax._optim import combine as combine
from lora_jax._optim import labels as labels
from lora_jax._optim import optimizer as optimizer
from lora_jax._optim import split as split
from lora_jax._optim import value_and_grad as value_and_grad
from lora_jax._optimizers import lora_fa as lora_fa
from lora_jax._optimizers import lora_plus as lora_plus
from lora_jax._optimizers import riemannian as riemannian
from lora_jax._params import Adapter as Adapter
from lora_jax._params import Factors as Factors
from lora_jax._params import LoraParams as LoraParams
from lora_jax._quantize import dequantize as dequantize
from lora_jax._quantize import quantization_error as quantization_error
from lora_jax._quantize import quantize as quantize
from lora_jax._resize import resize as resize
from lora_jax._shardings import shardings as shardings
from lora_jax._shardings import state_shardings as state_shardings
from lora_jax._similarity import distance as distance
from lora_jax._similarity import similarity as similarity
from lora_jax._similarity import subspace_similarity as subspace_similarity
from lora_jax._stack import stack as stack
from lora_jax._take import replace_at as replace_at
from lora_jax._take import take as take
from lora_jax._ties import dare as dare
from lora_jax._ties import prune as prune
from lora_jax._ties import ties as ties
from lora_jax._transform._discover import Report as Report
from lora_jax._transform._discover import layout_of as layout_of
from lora_jax._transform._discover import report as report
from lora_jax._transform._lora import lora as lora
from lora_jax._transform._lora_routed import lora_routed as lora_routed
from lora_jax._transform._lora_rows import lora_rows as lora_rows
from lora_jax._transform._moments import input_moments as input_moments
from lora_jax._unstack import unstack as unstack

__version__ = "0.1.0"
