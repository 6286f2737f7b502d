import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import HubSource
from cluster.errors import UsageError
from generation.sources import hub

ROWS = [{"text": f"row {n}", "label": n % 2} for n in range(5)]


@pytest.fixture
def folder(tmp_path):
    """A dataset folder as `push_to_hub` leaves it: a card that names the files of each configuration and split."""
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data" / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), tmp_path / "small.parquet")
    configs = "- {config_name: all, data_files: [{split: train, path: data/train-*}]}\n- {config_name: small, data_files: small.parquet}\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return tmp_path


def test_a_local_folder_in_hub_layout_is_streamed_by_subset_and_split(folder):
    assert [row for _, row in hub.rows(HubSource(name=str(folder), subset="all"))] == ROWS
    places, rows = zip(*hub.rows(HubSource(name=str(folder), subset="small")), strict=True)
    assert list(rows) == ROWS[:2] and places == (f"{folder}/train:1", f"{folder}/train:2")


def test_a_name_needs_a_pinned_commit():
    with pytest.raises(UsageError, match=r"source.name=owner/set is no local folder, so source.revision must pin"):
        list(hub.rows(HubSource(name="owner/set")))


def test_a_dataset_that_cannot_be_read_is_one_line(folder):
    for source in (HubSource(name=str(folder), subset="all", split="test"), HubSource(name="owner/none", revision="0" * 40)):
        with pytest.raises(UsageError, match=r"cannot be read: .*; check name, subset, split, revision and network") as caught:
            list(hub.rows(source))
        assert "\n" not in str(caught.value)
