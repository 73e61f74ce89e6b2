"""The activation functions a config may name: a closed list, so that no text in a checkpoint is looked up anywhere else.

`modelrig.modules.activations` holds the functions under the same names.
"""

ACTIVATIONS = (
    "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu",
    "mish", "sigmoid", "tanh", "linear",
)  # fmt: skip
