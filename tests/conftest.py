"""Fixtures of all tests. jaxtyping's run-time check of signatures is switched on in pyproject.toml."""

import gc
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest

# Compiling takes most of the tests' time, and many tests and processes compile the same programs. They are kept on disk, for
# this version of jax, and every process that a test starts inherits the folder.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "crcjax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / f"tests-jax-{importlib.metadata.version('jax')}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Without LLVM's optimisations a program compiles in two thirds of the time. Tests that time a program or set device counts
# have XLA_FLAGS of their own.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Markers and fixtures of the tests that `make test-system` runs and `make test` leaves out.
_SYSTEM_MARKERS = {"slow", "slurm", "ray", "redis", "torch"}
_TORCH_FIXTURES = {"twins", "torch"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the system tests."""
    for item in items:
        if _TORCH_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("torch")
        if _SYSTEM_MARKERS & {marker.name for marker in item.iter_markers()}:
            item.add_marker("system")


@pytest.fixture(scope="module", autouse=True)
def _memory_of_programs() -> Iterator[None]:
    """Frees compiled programs once they fill 2 GiB; the disk keeps them. Later modules use the others again."""
    yield
    resident_gib = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    if "jax" in sys.modules and resident_gib > 2:
        sys.modules["jax"].clear_caches()
        gc.collect()


def _required(part: str) -> bool:
    return part in os.environ.get("CRCJAX_REQUIRE", "").split(",")


@pytest.fixture(scope="session")
def required() -> Callable[[str], bool]:
    """required(part): whether CRCJAX_REQUIRE says that a missing part is a failure, not a skip."""
    return _required


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides and tables; absent on most machines."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CRCJAX_REAL_DATA", default))
    if not (folder / "slides").is_dir():
        message = f"no real slides: CRCJAX_REAL_DATA is {folder}"
        if _required("real_data"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


class _OpenedPage:
    """A page in headless Chromium; `errors` are what its console reports."""

    def __init__(self, page):
        self.page, self.errors = page, []
        page.on(
            "console",
            lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("requestfailed", lambda request: self.errors.append(request.url))

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def box(self, selector: str) -> dict:
        """Place and size of an element."""
        return self.page.locator(selector).bounding_box()

    def empty_images(self) -> list[str]:
        """Descriptions of the images that do not show, or that are of one colour."""
        script = """async () => {
          const empty = [];
          for (const image of document.images) {
            await image.decode().catch(() => empty.push(image.alt));
            const canvas = document.createElement('canvas'), draw = canvas.getContext('2d');
            canvas.width = 120; canvas.height = 80;
            draw.fillStyle = 'white'; draw.fillRect(0, 0, 120, 80); draw.drawImage(image, 0, 0, 120, 80);
            const pixels = draw.getImageData(0, 0, 120, 80).data;
            let dark = 0;
            for (let i = 0; i < pixels.length; i += 4) dark += pixels[i] + pixels[i + 1] + pixels[i + 2] < 700;
            if (dark < 40) empty.push(image.alt);
          }
          return empty;
        }"""
        return self.page.evaluate(script)


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """The system's headless Chromium, as Playwright's Browser."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    playwright = None
    with suppress(ImportError):
        from playwright import sync_api as playwright
    if not executable or playwright is None:
        message = (
            "no browser: pages are looked at in Chromium, with the Python package playwright: make browser-packages"
        )
        if _required("browser"):
            pytest.fail(message)
        pytest.skip(message)
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def browser(chromium) -> Callable:
    """browser(path, width=1280): a context manager that opens a page in the system's headless Chromium, offline."""

    @contextmanager
    def open_page(path: Path, width: int = 1280, height: int = 900) -> Iterator[_OpenedPage]:
        context = chromium.new_context(viewport={"width": width, "height": height}, offline=True)
        opened = _OpenedPage(context.new_page())
        opened.page.goto(path.absolute().as_uri())
        yield opened
        context.close()

    return open_page


@pytest.fixture
def small_disk(tmp_path: Path):
    """A folder on a file system of 4 MiB, to be filled; mounting it needs root."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        message = "a full disk is tried on a small tmpfs, which only root can mount"
        if _required("root"):
            pytest.fail(message)
        pytest.skip(message)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def crcjax() -> Callable[..., subprocess.CompletedProcess]:
    """crcjax(*arguments): runs the command within this process, which saves the seconds of its start."""
    from crcjax.cli import main

    def run_command(*arguments: object) -> subprocess.CompletedProcess:
        command, status = ["crcjax", *map(str, arguments)], 0
        with pytest.MonkeyPatch.context() as patch, io.StringIO() as out, io.StringIO() as err:
            patch.setattr("sys.argv", command)
            with redirect_stdout(out), redirect_stderr(err):
                try:
                    main()
                except SystemExit as exit_:
                    status = int(exit_.code or 0)
            return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())

    return run_command


@pytest.fixture(scope="session")
def ray_cluster(required: Callable[[str], bool]) -> Iterator[None]:
    """A Ray cluster on this machine, which states two GPUs, and this process has joined it."""
    try:
        import ray
    except ImportError:
        if required("ray"):
            pytest.fail("Ray is not installed")
        pytest.skip("Ray is not installed")
    with warnings.catch_warnings():
        # Ray forks to run its own programs at once, which harms no thread of JAX.
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def write_h5() -> Callable[..., Path]:
    """write_h5(path, {dataset: values}, about, dataset=attributes): an HDF5 file, the attributes `about` its own."""

    def write(path: Path, datasets: dict, about: dict | None = None, **attributes: dict) -> Path:
        import h5py

        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file.attrs.update(about or {})
            for name, values in datasets.items():
                file.create_dataset(name, data=values).attrs.update(attributes.get(name, {}))
        return path

    return write


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a painted cohort (cohort.csv: 12 train, 3 val, 6 test cases) and its tile store at 10x, 64 px."""
    from crcjax.data.cohort import load_cohort
    from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
    from crcjax.slides.synthetic.painter import paint_cohort
    from crcjax.slides.tiling.plan import TilingParams

    folder = tmp_path_factory.mktemp("painted")
    table = paint_cohort(folder, {"train": 12, "val": 3, "test": 6}, size_px=(800, 640), mpp=1.0)
    jobs = [TileJob(row.slide_id, row.path) for row in load_cohort(table, None).rows]
    assert all(outcome.succeeded for outcome in tile_slides(jobs, folder / "store", TilingParams(("10x",), tile_px=64)))
    return folder


def _small_config(painted: Path):
    from crcjax.config import get_config

    config = get_config()
    config.data.store, config.data.cohort = str(painted / "store"), str(painted / "cohort.csv")
    config.data.regions_per_bag, config.data.batch_size, config.data.region_buckets = 4, 4, (64, 128)
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.train.steps, config.train.eval_every, config.train.checkpoint_every = 6, 3, 2
    config.train.log_every, config.optimizer.warmup_steps = 1, 2
    return config


@pytest.fixture
def small_config(painted: Path):
    """A config that trains on the painted cohort in seconds."""
    return _small_config(painted)


@pytest.fixture(scope="session")
def small_config_of(painted: Path) -> Callable:
    """small_config_of(): a new `small_config`, for fixtures that live longer than a test."""
    return lambda: _small_config(painted)


@pytest.fixture(scope="session")
def run(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained run, to be read only."""
    from crcjax.train.loop import train

    path = tmp_path_factory.mktemp("run")
    train(_small_config(painted), path)
    return path


@contextmanager
def _symbolic_shapes() -> Iterator[None]:
    """Without jaxtyping's checks: beartype takes an axis of unknown length for none."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def symbolic_shapes() -> Iterator[None]:
    """For tests that export models, which have axes of unknown length."""
    with _symbolic_shapes():
        yield


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small trained run as ONNX and StableHLO graphs."""
    pytest.importorskip("jax2onnx", reason="needs jax2onnx (docs/export.md)")
    from crcjax.predict.export_model import export_model

    out = tmp_path_factory.mktemp("exported") / "model"
    with _symbolic_shapes():
        export_model([run], out)
    return out
