import pytest
from models import tiny_llama


@pytest.fixture
def tiny_config(tmp_path) -> str:
    """The path of a tiny model's config.json."""
    tiny_llama().config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")
