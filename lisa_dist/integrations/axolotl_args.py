"""The keys of LISA in an Axolotl configuration, by the names that they have in a recipe."""

from dataclasses import fields
from typing import Any

from pydantic import BaseModel, create_model

from lisa_dist.config import LisaConfig
from lisa_dist.integrations.settings import OF_MIXIN

AXOLOTL_S = "lisa_layers_attribute"  # a key of its own too, of the same meaning
NAMES = [*(one.name for one in fields(LisaConfig) if one.name != AXOLOTL_S), *OF_MIXIN]
LisaArgs: type[BaseModel] = create_model("LisaArgs", **dict.fromkeys(NAMES, (Any, None)))  # type: ignore[call-overload]
