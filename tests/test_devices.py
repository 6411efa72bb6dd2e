"""Machines as data: detected in made-up trees of sysfs, described in files, named by users."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch import boardfile, detection, devices, target
from stitch.errors import EmptyDevice, InvalidBoard, OverlappingDevices, UnavailableCpus, UnknownDevice
from stitch.topology import SHARED, Board, Cache, Cluster, Link, Rates, parse_cpus, render_cpus

NEON = target.NAMES["neon"]


def tree(root: Path, cpus: list[dict[str, str]], online: str = "") -> Path:
    """A folder like /sys/devices/system/cpu, from the files of each CPU."""
    folder = root / "devices" / "system" / "cpu"
    for k, files in enumerate(cpus):
        for name, text in files.items():
            path = folder / f"cpu{k}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
    (folder / "online").write_text(online or render_cpus(range(len(cpus))))
    return folder


def cache(index: int, level: int, size: str, shared: str, kind: str = "Unified") -> dict[str, str]:
    files = {"level": str(level), "size": size, "shared_cpu_list": shared, "type": kind}
    return {f"cache/index{index}/{name}": text for name, text in files.items()}


def big_little() -> list[dict[str, str]]:
    rows = []
    for k in range(8):
        low = k < 4
        rows.append(
            {"cpu_capacity": "462" if low else "1024", "cpufreq/cpuinfo_max_freq": "1844000" if low else "2362000"}
            | {"topology/core_cpus_list": str(k), "topology/physical_package_id": "0" if low else "1"}
            | cache(0, 1, "32K", str(k), "Data") | cache(1, 1, "48K", str(k), "Instruction")
            | cache(2, 2, "1024K" if low else "2048K", "0-3" if low else "4-7")
        )  # fmt: skip
    return rows


def hybrid(root: Path) -> Path:
    """Two P cores of two threads whose capacities differ a little, and two E cores that share a cache of level 2."""
    rows = [
        {"cpu_capacity": capacity, "topology/core_cpus_list": core, "topology/physical_package_id": "0"}
        | cache(0, 2, "1280K" if k < 4 else "2048K", core if k < 4 else "4-5") | cache(1, 3, "25M", "0-5")
        for k, (capacity, core) in enumerate(
            [("1024", "0-1"), ("1024", "0-1"), ("1001", "2-3"), ("1001", "2-3"), ("620", "4"), ("620", "5")]
        )
    ]  # fmt: skip
    return tree(root, rows)


# ------------------------------------------------------------------ detection


def test_big_little(tmp_path: Path) -> None:
    board = detection.detect(tree(tmp_path, big_little()), range(8), NEON)
    big, little = board.clusters
    assert (big.name, big.cpus, big.capacity, big.hertz) == ("big", (4, 5, 6, 7), 1024, 2.362e9)
    assert (little.name, little.cpus, little.capacity) == ("little", (0, 1, 2, 3), 462)
    assert big.caches == (Cache(1, 32 << 10, 1), Cache(2, 2 << 20, 4))
    assert board.nicknames["big"] == (4, 5, 6, 7)
    assert boardfile.parse(str(board)) == board


def test_only_what_the_mask_allows(tmp_path: Path) -> None:
    board = detection.detect(tree(tmp_path, big_little()), {2, 3, 7}, NEON)
    assert board.cpus == (2, 3, 7)
    assert board.excluded == (0, 1, 4, 5, 6)
    assert [c.caches[1].shared for c in board.clusters] == [1, 2]
    assert boardfile.parse(str(board)) == board
    with pytest.raises(
        UnavailableCpus, match=r"the CPUs 4-6 of the device 'cpu:4-7' are outside of .* there are 2-3,7"
    ):
        devices.parse("cpu:4-7", board)


def test_offline_cpus_are_not_there(tmp_path: Path) -> None:
    board = detection.detect(tree(tmp_path, big_little(), online="0-5"), range(8), NEON)
    assert board.cpus == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("named", [True, False])
def test_x86_with_two_kinds_of_cores(tmp_path: Path, named: bool) -> None:
    folder = hybrid(tmp_path)
    if named:
        for name, cpus in (("cpu_core", "0-3"), ("cpu_atom", "4-5")):
            (tmp_path / "devices" / name).mkdir()
            (tmp_path / "devices" / name / "cpus").write_text(cpus)
    big, little = detection.detect(folder, range(6)).clusters
    assert (big.name, big.cores) == ("big", ((0, 1), (2, 3)))
    assert (little.name, little.cores) == ("little", ((4,), (5,)))
    assert big.caches[-1] == Cache(3, 25 << 20, 4)


def test_equal_cores_are_clusters_by_their_last_cache(tmp_path: Path) -> None:
    rows = [cache(0, 3, "32M", "0-1" if k < 2 else "2-3") for k in range(4)]
    board = detection.detect(tree(tmp_path, rows), range(4))
    assert [(c.name, c.cpus) for c in board.clusters] == [("cpu0", (0, 1)), ("cpu1", (2, 3))]
    assert "big" not in board.nicknames


def test_private_caches_are_no_reason_for_clusters(tmp_path: Path) -> None:
    rows = [cache(0, 2, "512K", str(k)) for k in range(4)]
    assert [c.cpus for c in detection.detect(tree(tmp_path, rows), range(4)).clusters] == [(0, 1, 2, 3)]


def test_clusters_without_caches_are_the_kernels(tmp_path: Path) -> None:
    rows = [{"topology/cluster_cpus_list": "0-1" if k < 2 else "2-3"} for k in range(4)]
    assert len(detection.detect(tree(tmp_path, rows), range(4)).clusters) == 2


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    board = detection.detect(tmp_path / "nowhere", [0, 1])
    assert [(c.name, c.cpus) for c in board.clusters] == [("cpu", (0, 1))]


def test_broken_files_are_as_good_as_none(tmp_path: Path) -> None:
    rows = [{"cpu_capacity": "many", "topology/core_cpus_list": "x-"} | cache(0, 2, "big", "?") for _ in range(2)]
    assert detection.detect(tree(tmp_path, rows), range(2)).cpus == (0, 1)


def test_this_machine() -> None:
    board = detection.detect()
    assert board.cpus == tuple(sorted(detection._affinity()))
    assert boardfile.parse(str(board)) == board


# ------------------------------------------------------------------ what users write


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return detection.detect(tree(tmp_path, big_little()), range(7), NEON)


@pytest.mark.parametrize(
    ("text", "cpus", "canonical"),
    [
        ("cpu", (0, 1, 2, 3, 4, 5, 6), "cpu:0-6"),
        ("cpu:0", (0,), "cpu:0"),
        ("cpu:0-3", (0, 1, 2, 3), "cpu:0-3"),
        (" cpu:4,0,2 ", (0, 2, 4), "cpu:0,2,4"),
        ("big", (4, 5, 6), "cpu:4-6"),
        ("little", (0, 1, 2, 3), "cpu:0-3"),
        ("cpu:1@0.4", (1,), "cpu:1@0.4"),
        ("big@1", (4, 5, 6), "cpu:4-6"),
        ("onnxruntime", (), "onnxruntime"),
        ("null", (), "null"),
    ],
)
def test_names_of_devices(board: Board, text: str, cpus: tuple[int, ...], canonical: str) -> None:
    device = devices.parse(text, board)
    assert device.cpus == cpus
    assert str(device) == canonical
    assert devices.parse(str(device), board) == device


@pytest.mark.parametrize("text", ["cpu:1@0", "cpu:1@2", "cpu:1@", "cpu:1@half", "null@0.5", "cpu:1@nan"])
def test_a_share_is_of_a_core(board: Board, text: str) -> None:
    with pytest.raises(UnknownDevice, match="a share is a number above 0, up to 1"):
        devices.parse(text, board)


@given(st.sets(st.integers(0, 7), min_size=1))
def test_devices_are_what_their_text_says(cpus: set[int]) -> None:
    kirin = boardfile.load("kirin970")
    device = devices.parse(f"cpu:{render_cpus(cpus)}", kirin)
    assert set(device.cpus) == cpus
    assert devices.parse(str(device), kirin) == device


def test_two_threads_of_a_core_are_one_core() -> None:
    x86 = boardfile.load("x86_hybrid")
    assert devices.parse("cpu:0-1", x86).cores == 1
    assert devices.parse("cpu", x86).cores == 12


@pytest.mark.parametrize(
    ("texts", "error", "complaint"),
    [
        (["gpu"], UnknownDevice, "no device 'gpu'.*'cpu', 'cpu:0-6', 'big', 'little', 'onnxruntime', 'null'"),
        (["bigg"], UnknownDevice, "did you mean 'big'"),
        (["cpu:a"], UnknownDevice, "'a' is neither a CPU's number nor a range"),
        (["cpu:3-1"], UnknownDevice, "the range '3-1' is empty"),
        (["cpu:0-99999999"], UnknownDevice, "there is no CPU 99999999"),
        (["cpu:"], EmptyDevice, "'cpu:' has no CPU; name some of the CPUs 0-6"),
        ([], EmptyDevice, "a list of devices names none"),
        (["cpu:8"], UnavailableCpus, "the CPUs 8 of the device 'cpu:8' do not exist; there are 0-6"),
        (["cpu:6-7"], UnavailableCpus, "the CPUs 7 .* outside of this process's affinity mask; there are 0-6"),
        (["cpu:0-1", "null", "cpu:1-2"], OverlappingDevices, "'cpu:0-1' and 'cpu:1-2' share the CPUs 1;.* 0-6"),
        (["cpu", "big"], OverlappingDevices, "share the CPUs 4-6"),
    ],
)
def test_wrong_devices(board: Board, texts: list[str], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        devices.parse_all(texts, board)


def test_names_where_cores_are_equal(tmp_path: Path) -> None:
    equal = detection.detect(tmp_path, [0, 1])
    with pytest.raises(UnknownDevice, match="'big': all cores of this machine have the same capacity"):
        devices.parse("big", equal)


def test_several_devices(board: Board) -> None:
    assert [str(d) for d in devices.parse_all(["cpu:0", "cpu:1", "onnxruntime"], board)] == [
        "cpu:0", "cpu:1", "onnxruntime",
    ]  # fmt: skip
    assert devices.parse_all("cpu", board) == (devices.parse("cpu", board),)


@given(st.sets(st.integers(0, 300)))
def test_lists_of_cpus(cpus: set[int]) -> None:
    assert parse_cpus(render_cpus(cpus)) == tuple(sorted(cpus))


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("name", boardfile.shipped())
def test_shipped_boards(name: str) -> None:
    board = boardfile.load(name)
    assert board.name == name
    assert boardfile.parse(str(board), complete=True) == board
    for cluster in board.clusters:
        target.parse(cluster.target or board.target)
        assert all(cache.shared <= sum(len(c.cores) for c in board.clusters) for cache in cluster.caches)


def test_which_boards_there_are() -> None:
    assert boardfile.shipped() == ("kirin970", "raspberry_pi5", "x86_hybrid")
    kirin = boardfile.load("kirin970")
    assert (kirin.nicknames["big"], kirin.nicknames["little"]) == ((4, 5, 6, 7), (0, 1, 2, 3))
    with pytest.raises(UnknownDevice, match=r"'kirin970', 'raspberry_pi5', 'x86_hybrid', 'a file as board.toml'"):
        boardfile.load("kirin")


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
numbers = st.floats(0, 1e15, allow_nan=False)
rates = st.one_of(st.floats(1e-3, 1e15), st.just(float("inf")))
measured = st.builds(Rates, rates, rates, rates, numbers, st.integers(1, 9), st.floats(0, 1))


@settings(max_examples=40)
@given(st.data())
def test_a_board_is_what_its_text_says(data: st.DataObject) -> None:
    draw = data.draw
    clusters = tuple(
        Cluster(
            name, ((2 * k,), (2 * k + 1,)), draw(st.integers(1, 2000)), draw(numbers), draw(numbers), draw(numbers),
            tuple(Cache(level, draw(st.integers(1, 1 << 40)), 2, draw(numbers)) for level in (1, 2)),
            draw(st.sampled_from(("", str(NEON)))),
            draw(st.one_of(st.none(), measured)),
        )
        for k, name in enumerate(draw(st.lists(names, unique=True, min_size=1, max_size=3)))
    )  # fmt: skip
    links = tuple(Link(clusters[0].name, "*", draw(numbers), draw(rates)) for _ in range(draw(st.integers(0, 2))))
    memory, excluded = draw(st.integers(0, 1 << 50)), draw(st.sampled_from(((), (7, 9))))
    board = Board(draw(names), str(NEON), clusters, links, memory, draw(names), excluded)
    assert boardfile.parse(str(board)) == board


GOOD = str(boardfile.load("raspberry_pi5"))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('target = "', '# "', "target: it is missing; the fields are 'name', 'about', 'target'"),
        ("hertz = 2400000000.0", "", r"clusters\[0\].hertz: it is missing"),
        ("hertz = 2400000000.0", "hertz = 0", r"clusters\[0\].hertz: it must be above zero"),
        ("flops = 38400000000.0", "flops = -1", r"clusters\[0\].flops: -1.0 must be zero or more"),
        ("flops = 38400000000.0", "flops = nan", r"clusters\[0\].flops: nan is not a number to calculate with"),
        ("flops = 38400000000.0", "flops = true", r"clusters\[0\].flops: True is not a number"),
        ("hertz = 2400000000.0", "herz = 1.0", r"clusters\[0\].herz: there is no such field; did you mean 'hertz'"),
        ('name = "a76"', 'name = ""', r"clusters\[0\].name: '' is not a text that is not empty"),
        ('["0", "1", "2", "3"]', "[]", r"clusters\[0\].cores: .* is not a list of CPUs"),
        ('["0", "1", "2", "3"]', '["0", ""]', r"clusters\[0\].cores\[1\]: a core has at least one CPU"),
        ('["0", "1", "2", "3"]', '["0", "x"]', r"clusters\[0\].cores\[1\]: 'x' is neither"),
        ('["0", "1", "2", "3"]', '["0", "0-1"]', "clusters: CPU 0 is there twice"),
        ("level = 2", "level = 0", r"clusters\[0\].caches\[1\].level: 0 must be above zero"),
        ("bytes = 65536", "", r"clusters\[0\].caches\[0\].bytes: it is missing"),
        ("bytes = 65536", "bytes = 1.5", "1.5 is not a whole number"),
        ("latency = 1e-05", "latency = -1e-05", r"links\[0\].latency: -1e-05 must be zero or more"),
        ('source = "*"', 'source = "gpu"', r"links\[0\]: there is no cluster 'gpu'; '\*', 'a76'"),
        ("[[links]]", "[links]", "links: .* is not a list of tables"),
        ("cortex-a76/128", "cortex-a76/100", "target: vectors of 100 bits are not supported"),
        ("[[clusters]]", "[[cluster]]", "cluster: there is no such field; did you mean 'clusters'"),
        ("memory", "= memory", "it is not TOML"),
    ],
)
def test_wrong_files(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in GOOD
    path = tmp_path / "board.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(InvalidBoard, match=complaint) as caught:
        boardfile.load(path)
    assert "board.toml" in str(caught.value)


def test_wrong_rates(tmp_path: Path) -> None:
    kirin = boardfile.load("raspberry_pi5")
    wrong = replace(kirin.clusters[0], rates=Rates(1, 1, 1, 0, 4, parallel=1.5))
    with pytest.raises(InvalidBoard, match=r"rates.parallel: it is a share"):
        boardfile.parse(str(replace(kirin, clusters=(wrong,))))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidBoard, match="not a text in UTF-8"):
        boardfile.load(path)
    with pytest.raises(OSError, match=r"nowhere\.toml"):
        boardfile.load("nowhere.toml")


def test_links_between_clusters() -> None:
    kirin = boardfile.load("kirin970")
    assert kirin.link("a53", "a73") is kirin.link("a73", "a53")
    assert kirin.link("a73", "a73").source == "*"
    assert kirin.link("a73", "a53").seconds(4e9) == pytest.approx(1 + 20e-6)
    near = replace(kirin, links=(*kirin.links, Link("*", "a53", 0.0, 1.0)))
    assert near.link("a53", "a53").bandwidth == 1.0
    assert near.link("a73", "a53").bandwidth == 4e9
    assert replace(kirin, links=()).link("a73", "a53") == SHARED


def test_a_part_of_a_cluster_keeps_its_rates() -> None:
    whole = boardfile.load("kirin970").clusters[0]
    part = whole.only({4, 5})
    assert part is not None
    assert (part.cpus, part.rates) == ((4, 5), whole.rates)
    assert whole.only({0}) is None


def test_boards_are_installed() -> None:
    """What the build takes along: the patterns in pyproject.toml find every file."""
    import tomllib

    root = Path(__file__).resolve().parent.parent
    with (root / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["stitch"]
    taken = {path for pattern in patterns for path in (root / "stitch").glob(pattern)}
    assert set(boardfile.FOLDER.iterdir()) <= taken
