"""What each key of another tool is here. Keys that have no rule and are flags here stay as they are."""

from lisa_dist.convert.axolotl_rules import AXOLOTL_DEFAULTS, AXOLOTL_RULES
from lisa_dist.convert.common_rules import COMMON
from lisa_dist.convert.llama_factory_rules import FACTORY_DEFAULTS, FACTORY_LORA, FACTORY_RULES
from lisa_dist.convert.lmflow_rules import LMFLOW_DEFAULTS, LMFLOW_LISA, LMFLOW_LORA, LMFLOW_RULES
from lisa_dist.convert.ms_swift_rules import SWIFT_DEFAULTS, SWIFT_GRPO, SWIFT_LORA, SWIFT_RULES
from lisa_dist.convert.reading import AXOLOTL, LLAMA_FACTORY, LMFLOW, SWIFT
from lisa_dist.convert.rule import Flags, Rule
from lisa_dist.convert.task_rules import TASK_RULES

RULES: dict[str, dict[str, Rule]] = {
    tool: COMMON | rules | TASK_RULES.get(tool, {})
    for tool, rules in (
        (AXOLOTL, AXOLOTL_RULES), (LLAMA_FACTORY, FACTORY_RULES), (SWIFT, SWIFT_RULES), (LMFLOW, LMFLOW_RULES),
    )
}  # fmt: skip
# What a configuration of theirs means where it says nothing, and ours does not.
DEFAULTS: dict[str, Flags] = {
    AXOLOTL: AXOLOTL_DEFAULTS, LLAMA_FACTORY: FACTORY_DEFAULTS, SWIFT: SWIFT_DEFAULTS, LMFLOW: LMFLOW_DEFAULTS,
}  # fmt: skip
# The same for adapters, for LISA, and for GRPO.
OF_LORA: dict[str, Flags] = {LLAMA_FACTORY: FACTORY_LORA, SWIFT: SWIFT_LORA, LMFLOW: LMFLOW_LORA}
OF_LISA: dict[str, Flags] = {LMFLOW: LMFLOW_LISA}
OF_GRPO: dict[str, Flags] = {SWIFT: SWIFT_GRPO}
