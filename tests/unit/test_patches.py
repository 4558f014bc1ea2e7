"""Other libraries are changed in two places: by lisa_dist/zero, and by what the table of patches.py lists."""

import ast
import re
import sys
from collections.abc import Iterator

import pytest
from runs import ROOT, python_files
from torch import nn

from lisa_dist.patches import PATCHES, patch, patched

PACKAGE = ROOT / "lisa_dist"
TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
    for path in python_files(PACKAGE)
    if path.parent != PACKAGE / "zero" and path != PACKAGE / "patches.py"
}
# What the rule finds and what is no replacement of another library's code, with the reason.
ALLOWED = {
    (
        "checkpoint/resume.py",
        "setattr(engine, name, state['engine'][name])",
    ): "counters of a run, as DeepSpeed loads them",
    ("core/adapters.py", "vars(model)[OUR_ADAPTERS]"): "a mark of ours",
    ("core/blocks.py", "setattr(parameter, _FROZEN_BY_LISA, not active)"): "a mark of ours",
    ("core/blocks.py", "vars(parameter).pop(_FROZEN_BY_LISA, False)"): "a mark of ours",
    (
        "core/activation_checkpointing.py",
        "module._forward_hooks[handle]",
    ): "transformers removes the last of two such hooks alone",
    ("core/period_log.py", "vars(record).update(measure())"): "a record of ours",
    (
        "train/repeated_rows.py",
        "vars(inner).update(batch_sampler=marking, dataset=_MarkingDataset(loader.dataset))",
    ): "listed as repeated_rows; torch refuses to set these attributes, and so `patch` cannot",
    ("run/trainer.py", "trainer.write_card"): "an attribute of ours",
    ("run/inputs.py", "vars(processor)['tokenizer']"): "its tokenizer, a public attribute",
    ("train/deepspeed_arguments.py", "vars(args).pop('_setup_devices', None)"): "a value that is computed again",
    ("train/monitoring.py", "vars(new).update(vars(self))"): "a copy of arguments",
    ("train/monitoring.py", "vars(new).update(copy.deepcopy(vars(self), memo))"): "a copy of arguments",
    ("train/monitoring.py", "vars(plugin).update(hide_secrets(vars(plugin)))"): "a copy of a plugin",
}


def replacements(tree: ast.Module) -> Iterator[str]:
    """What may replace an attribute of another library's, as its source.

    Where x is not self, setattr and delattr of it, what changes `vars(x)` or `x.__dict__`, assigns x.forward,
    x.__class__, a private name of x or an entry of it (or deletes one of these two), any name of an x that is imported
    from another library, and a lambda, a partial or a bound method to any name. A function that is assigned to a public
    name of an instance, and what is done by way of another variable, it does not find.
    """
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] not in {*sys.stdlib_module_names, "lisa_dist"}
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and is_change_by_call(node):
            yield ast.unparse(node)
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            one = isinstance(node, ast.AugAssign | ast.AnnAssign)
            for target in [node.target] if one else node.targets:
                for each in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                    if is_replaced(each, getattr(node, "value", None), imported):
                        yield ast.unparse(each)


def is_change_by_call(node: ast.Call) -> bool:
    if isinstance(node.func, ast.Name):
        return node.func.id in ("setattr", "delattr") and ast.unparse(node.args[0]) != "self"
    changes = isinstance(node.func, ast.Attribute) and node.func.attr in ("update", "pop", "clear", "setdefault")
    return changes and is_vars(node.func.value)


def is_vars(node: ast.expr) -> bool:
    return bool(re.fullmatch(r"vars\((?!self\)).*\)|(?!self\.).*\.__dict__", ast.unparse(node)))


def is_replaced(target: ast.expr, value: ast.expr | None, imported: set[str]) -> bool:
    is_entry = isinstance(target, ast.Subscript)
    if is_entry and is_vars(target.value):
        return True
    attribute = target.value if is_entry else target
    if not isinstance(attribute, ast.Attribute) or ast.unparse(attribute.value) in ("self", "cls"):
        return False
    name, root = attribute.attr, ast.unparse(attribute).split(".")[0]
    if name.startswith("_") and not name.endswith("__"):
        return True
    if is_entry or value is None:
        return False
    is_method = isinstance(value, ast.Lambda) or re.match(
        r"(functools\.)?partial\(|types\.MethodType\(", ast.unparse(value)
    )
    return name in ("forward", "__class__") or root in imported or bool(is_method)


def test_nothing_is_replaced_but_by_patch():
    found = {(name, source) for name, tree in TREES.items() for source in replacements(tree)}
    assert found == ALLOWED.keys()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from trl.trainer import utils\nutils.pad = mine", 1),
        ("import torch\ntorch.nn.functional.linear = mine", 1),
        ("from transformers import Trainer\ndef f():\n    Trainer.log, x = mine, 1", 1),
        ("model.forward = mine", 1),
        ("class A:\n    def f(self):\n        self.module.forward = mine", 1),
        ("args.__class__ = Mine", 1),
        ("layer._compiled_call_impl = mine", 1),
        ("del module._forward_hooks[handle]", 1),
        ("vars(module)['name'] = mine", 1),
        ("engine.__dict__.update(name=mine)", 1),
        ("engine.step = lambda: None", 1),
        ("setattr(model, name, mine)", 1),
        # Settings.
        ("self._step = lambda: None", 0),
        ("vars(self)['a'] = 1", 0),
        ("args.lr = 1.0", 0),
        ("import os\nos.environ['A'] = 'b'", 0),
        ("parameter.grad = None", 0),
    ],
)
def test_what_the_rule_finds(source, found):
    assert len(list(replacements(ast.parse(source)))) == found


def test_every_key_is_used_and_every_used_one_is_in_the_table():
    """`compute_where_trained` hands its own key on."""
    used = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("patch", "patched", "compute_where_trained"):
                keys = [ast.unparse(word.value) for word in node.keywords if word.arg == "of"]
                assert len(keys) == 1, f"{name}: {ast.unparse(node)}"
                used.update(keys)
    assert used == {repr(key) for key in PATCHES} | {"of"}


def test_every_entry_says_what_why_whom_to_ask_and_until_when():
    assert list(PATCHES) == sorted(PATCHES)
    for key, entry in PATCHES.items():
        assert re.fullmatch(r"[^:]+: .+\. Upstream: .*(wanted|none|\w#\d+).*\. Remove when .+\.", entry), key


def test_a_patch_needs_a_name_that_is_there_and_a_key():
    linear = nn.Linear(1, 1)
    with pytest.raises(AssertionError, match="Linear has no forwards any more; forward of a module with frozen"):
        patch(linear, "forwards", None, of="frozen_forward")
    with pytest.raises(AssertionError, match="nobody_s"):
        patch(linear, "forward", None, of="nobody_s")
    with pytest.raises(AssertionError, match="nobody_s"), patched(linear, "forward", None, of="nobody_s"):
        pass
    assert "forward" not in vars(linear)


@pytest.mark.parametrize("own", [None, print])
def test_what_is_patched_for_a_while_is_put_back(own):
    linear = nn.Linear(1, 1)
    vars(linear).update({} if own is None else {"forward": own})
    with pytest.raises(ZeroDivisionError), patched(linear, "forward", repr, of="frozen_forward"):
        assert linear.forward is repr
        raise ZeroDivisionError
    assert vars(linear).get("forward") is own
    assert "forward" in vars(linear) or own is None
