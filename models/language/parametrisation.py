"""How initial scale and learning rate follow the width, so that settings found at one width serve another.

Widths are counted from `base_hidden_size`: with m = hidden_size / base_hidden_size a parametrisation is the standard
one at m = 1. Hidden matrices are those whose both sides grow with the width.

                 hidden: initial σ   hidden: Adam's rate   logits
    standard     initializer's       1                     1
    ntk          ∝ 1 / √m            1 / √m                1 / √m     Jacot et al. 2018 (arXiv 1806.07572)
    mup          ∝ 1 / √m            1 / m                 1 / m      Yang et al. 2022 (arXiv 2203.03466), table 8

Embeddings, norms and biases keep their σ and rate. NTK's multiplier c = 1/√fan_in in front of a weight of σ = 1 is
folded into the weight: Adam does not see the scale of a gradient, so w = c W moves as W does with c times the rate
(tensor programs V, lemma J.1). Decoupled weight decay is the exception: it weakens with the rate.
"""

from typing import TYPE_CHECKING

from models.language.config import LanguageConfig

if TYPE_CHECKING:
    from models.language.decoder import Decoder

EXPONENTS = {"standard": 0.0, "ntk": 0.5, "mup": 1.0}  # of 1/m in the rate and in the logits


def head_multiplier(config: LanguageConfig) -> float:
    """What the final hidden states are multiplied by before the output head."""
    return (config.base_hidden_size / config.hidden_size) ** EXPONENTS[config.parametrization]


def learning_rate_multipliers(model: "Decoder") -> dict[str, float]:
    """What each parameter's learning rate is multiplied by, by name; 1 for those that are not named."""
    config = model.config
    factor = (config.base_hidden_size / config.hidden_size) ** EXPONENTS[config.parametrization]
    if factor == 1.0:
        return {}
    return {name: factor for name, p in model.named_parameters() if is_hidden(name) and p.dim() > 1}


def is_hidden(name: str) -> bool:
    """Whether a matrix of this name lies inside the layers. An adapter's do not count: their rank is no width."""
    return name.startswith("layers.") and ".adapters." not in name
