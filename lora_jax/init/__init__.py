"""How factors start: functions ``(key, target) -> (a, b)``, for ``lorafy(params, init=...)``.

``a`` is ``[*batch, in, rank]`` and ``b`` ``[*batch, rank, out]``. One whose product is not zero
returns, as a third, what is left of the weight: ``lorafy`` puts that into the base, so that the
adapted model starts as the model that was given.
"""

from lora_jax.init._data import corda as corda
from lora_jax.init._data import eva as eva
from lora_jax.init._data import eva_ranks as eva_ranks
from lora_jax.init._data import lora_ga as lora_ga
from lora_jax.init._quantized import loftq as loftq
from lora_jax.init._random import gaussian as gaussian
from lora_jax.init._random import kaiming_uniform as kaiming_uniform
from lora_jax.init._random import orthogonal as orthogonal
from lora_jax.init._svd import olora as olora
from lora_jax.init._svd import pissa as pissa
from lora_jax.init._target import Initializer as Initializer
from lora_jax.init._target import Target as Target
