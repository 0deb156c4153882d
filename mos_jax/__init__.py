"""MoS (Mixture of Shards) and its rivals: fine-tuning by sharing, in JAX.

The names here are public; every other name may change between versions.
"""

from mos_jax.adapters.adapter import Adapter, AdapterConfig
from mos_jax.adapters.bank import AdapterBank
from mos_jax.adapters.combine import combine
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.methods import METHODS, count_parameters, create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.prolora import PRoLoRAConfig
from mos_jax.adapters.rasa import RaSAConfig
from mos_jax.adapters.share_lora import ShareLoRAConfig
from mos_jax.adapters.sites import SiteShape, select_sites
from mos_jax.adapters.storage import load_adapter, save_adapter
from mos_jax.adapters.tied_lora import TiedLoRAConfig
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.errors import InputError
from mos_jax.interop.adapter_gguf import read_adapter_gguf, write_adapter_gguf
from mos_jax.interop.huggingface_out import write_model
from mos_jax.interop.merged import merge
from mos_jax.interop.peft import export_peft
from mos_jax.interop.peft_import import import_peft
from mos_jax.interop.peft_native import export_native
from mos_jax.models.base import Base, load_base
from mos_jax.models.generation import Sampling, generate
from mos_jax.serving.engine import Engine
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.options import BankOptions
from mos_jax.serving.requests import Done, Piece, Refused, Request, TokenInfo, TokenSampling
from mos_jax.serving.tenants import TenantBank

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterBank",
    "AdapterConfig",
    "BankOptions",
    "Base",
    "Done",
    "Engine",
    "EngineOptions",
    "InputError",
    "LoRAConfig",
    "LowRank",
    "MoSConfig",
    "PRoLoRAConfig",
    "Piece",
    "RaSAConfig",
    "Refused",
    "Request",
    "Sampling",
    "ShareLoRAConfig",
    "SiteShape",
    "TenantBank",
    "TiedLoRAConfig",
    "TokenInfo",
    "TokenSampling",
    "UniLoRAConfig",
    "VBLoRAConfig",
    "VeRAConfig",
    "combine",
    "count_parameters",
    "create_adapter",
    "export_native",
    "export_peft",
    "generate",
    "import_peft",
    "load_adapter",
    "load_base",
    "merge",
    "read_adapter_gguf",
    "save_adapter",
    "select_sites",
    "write_adapter_gguf",
    "write_model",
]
