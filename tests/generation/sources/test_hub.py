import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import HubSource, fingerprint
from cluster.errors import UsageError
from generation.sources import hub
from generation.sources.values import Cells

ROWS = [{"text": f"row {n}", "label": n % 2} for n in range(5)]


@pytest.fixture
def folder(tmp_path):
    """A dataset folder as `push_to_hub` leaves it: a card that names the files of each configuration and split."""
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data" / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), tmp_path / "small.parquet")
    configs = "- {config_name: all, data_files: [{split: train, path: data/train-*}]}\n- {config_name: small, data_files: small.parquet}\n"
    (tmp_path / "template_1" / "train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS[1:4]), tmp_path / "template_1" / "train" / "0000.parquet")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return tmp_path


def test_a_local_folder_in_hub_layout_is_read_by_subset_and_split(folder):
    assert [row for _, row in hub.read_rows(HubSource(name=str(folder), subset="all"))] == ROWS
    locations, rows = zip(*hub.read_rows(HubSource(name=str(folder), subset="small")), strict=True)
    assert list(rows) == ROWS[:2] and locations == (f"{folder}/train:1", f"{folder}/train:2")


def test_data_dir_reads_one_folder_of_the_dataset(folder):
    assert [row for _, row in hub.read_rows(HubSource(name=str(folder), data_dir="template_1"))] == ROWS[1:4]


def test_subset_and_data_dir_together_are_refused():
    with pytest.raises(ValueError, match=r"subset=a with data_dir=b: .*leave one out"):
        HubSource(name="owner/set", subset="a", data_dir="b")


def test_data_dir_stays_out_of_the_fingerprint_while_it_has_its_default():
    plain = HubSource(name="owner/set")
    assert "data_dir" not in plain.model_dump() and HubSource(**plain.model_dump()) == plain
    assert HubSource(name="owner/set", data_dir="b").model_dump()["data_dir"] == "b"
    # The value that the commit before this setting gave.
    assert fingerprint(plain) == "7a2e7a0f45cc3705"


def test_a_hub_name_without_a_revision_is_refused():
    with pytest.raises(UsageError, match=r"source.name=owner/set is not a local folder, so source.revision must pin"):
        list(hub.read_rows(HubSource(name="owner/set")))


def test_an_unreadable_dataset_raises_an_error_of_one_line(folder):
    for source in (HubSource(name=str(folder), subset="all", split="test"), HubSource(name="owner/none", revision="0" * 40)):
        with pytest.raises(UsageError, match=r"cannot be read: .*; check name, subset, data_dir, split, revision and network") as caught:
            list(hub.read_rows(source))
        assert "\n" not in str(caught.value)


def test_a_folder_of_save_to_disk_is_read_with_and_without_splits(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved.select([1, 3])).save_to_disk(tmp_path / "two")
    assert [row for _, row in hub.read_rows(HubSource(name=str(tmp_path / "one")))] == ROWS
    assert [row for _, row in hub.read_rows(HubSource(name=str(tmp_path / "two"), split="test"))] == [ROWS[1], ROWS[3]]


def test_needed_columns_are_read_and_csv_rows_are_marked(tmp_path):
    far = pa.array([10**18], pa.int64()).cast(pa.timestamp("us"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    pq.write_table(pa.table({"question": ["q"], "time": far}), tmp_path / "a" / "train.parquet")
    assert [row for _, row in hub.read_rows(HubSource(name=str(tmp_path / "a")), {"question"})] == [{"question": "q"}]
    (tmp_path / "b" / "train.csv").write_text("question,references\nq,['a']\n")
    ((_, row),) = hub.read_rows(HubSource(name=str(tmp_path / "b")), {"question", "references"})
    assert isinstance(row, Cells) and row["references"] == "['a']"
