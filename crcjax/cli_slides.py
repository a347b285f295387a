"""The commands from slide files to stores: tile, overview, import, export, embed, deidentify, pseudonyms."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from crcjax.audit.commands import audited, digest_of, record_details
from crcjax.cli_options import STDERR, CohortFile, Mpp, PseudonymKey, Slides, progress_on_terminal
from crcjax.errors import InputError, SlideError

if TYPE_CHECKING:
    from crcjax.slides.preprocess.manifest import Outcome


@audited("tile")
def tile(
    slides: Slides = None,
    out: Annotated[Path, typer.Option(help="folder of the tile stores")] = ...,  # type: ignore[assignment]
    cohort: CohortFile = None,
    mag: Annotated[str, typer.Option(help="magnifications: 20x, or 10x,20x,40x")] = "20x",
    tile_px: Annotated[int, typer.Option(help="side of a tile in pixels")] = 256,
    mpp: Mpp = None,
    tissue_method: Annotated[
        Literal["robust", "otsu", "entropy"], typer.Option(help="method of tissue segmentation (docs/slides.md)")
    ] = "robust",
    min_tissue_mm2: Annotated[
        float,
        typer.Option(
            help="area of the smallest piece of tissue; on pictures of less than four times that, a quarter of the picture"
        ),
    ] = 0.02,
    include: Annotated[
        Path | None,
        typer.Option(help="folder of SLIDE_ID.geojson (QuPath) or SLIDE_ID.png: tile only these areas of each slide"),
    ] = None,
    exclude: Annotated[
        Path | None, typer.Option(help="folder of such files: tile everything except these areas")
    ] = None,
    icc: Annotated[bool, typer.Option("--icc", help="convert colours to sRGB by each slide's ICC profile")] = False,
    stain: Annotated[
        Literal["macenko", "vahadane", "reinhard"] | None,
        typer.Option(
            help="stain normalisation of the stored tiles; config.stain normalises in training instead and can be changed"
        ),
    ] = None,
    stain_reference: Annotated[
        Path | None, typer.Option(help="the slide whose stain is the reference; by default the published one")
    ] = None,
    pixels: Annotated[
        Literal["jpeg", "lossless"],
        typer.Option(
            help="native JPEG tiles where the grids agree, else JPEG of quality 90; or lossless, 7 times larger"
        ),
    ] = "jpeg",
    no_pixels: Annotated[
        bool,
        typer.Option(
            "--no-pixels", help="store no pixels: training reads them from the slide file, which must stay where it is"
        ),
    ] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=NUMBER, a limit of quality control: by default min_tissue=0.25, the smallest fraction of a tile that "
            "must be tissue, max_pen=0.2, the largest fraction under ink, and others (docs/slides.md); repeatable"
        ),
    ] = None,
    keep_all: Annotated[
        bool,
        typer.Option(
            "--keep-all",
            help="exclude no tile with tissue; quality control only states the tiles that it would exclude",
        ),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="cores to use; all by default")] = None,
    executor: Annotated[
        Literal["processes", "ray"], typer.Option(help="processes here, or the CPUs of a running Ray cluster")
    ] = "processes",
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="tile slides again even if that deletes their stored features; without it such a slide is refused",
        ),
    ] = False,
    shard: Annotated[str | None, typer.Option(help="I/N: only part I, from 1 to N, of the slides (see above)")] = None,
    slide_timeout_s: Annotated[float | None, typer.Option(help="fail a slide that takes longer")] = None,
    slide_memory_gib: Annotated[
        float | None, typer.Option(help="fail a slide whose worker process uses more memory")
    ] = None,
    pseudonym_key: PseudonymKey = None,
) -> None:
    """Cuts slides into tiles and stores them for training. Run again, it tiles only the slides that are missing.

    Several runs may share a store, such as those of a SLURM array:

    sbatch --array=1-16 --wrap 'crcjax tile SLIDES --out STORE --shard $SLURM_ARRAY_TASK_ID/16'

    STORE/manifest.jsonl lists the outcome of every slide.
    """
    from crcjax.data.slide_selection import named_slides
    from crcjax.slides.jobs.worker_pool import JobLimits
    from crcjax.slides.preprocess.tile_slides import TileJob, shard_of, tile_slides
    from crcjax.slides.tiling.plan import TilingParams
    from crcjax.slides.tiling.quality_control import QualityLimits, parse_limits
    from crcjax.slides.tiling.regions_of_interest import areas_of

    if no_pixels and pseudonym_key:
        raise InputError("--no-pixels keeps the slides' paths, which --pseudonym-key hides; keep the pixels")
    limits = parse_limits(limit or (), QualityLimits)
    params = TilingParams(
        tuple(mag.split(",")),
        tile_px,
        quality=limits,
        tissue=tissue_method,
        icc=icc,
        min_tissue_mm2=min_tissue_mm2,
        keep_all=keep_all,
    )
    if stain_reference and not stain:
        raise InputError("--stain-reference needs --stain macenko, vahadane or reinhard")
    if stain:
        from crcjax.slides.stain.normalisation import reference_stain  # loads JAX

        params = dataclasses.replace(params, stain=reference_stain(stain, stain_reference, params, mpp))
    jobs = [
        TileJob(
            slide.slide_id,
            slide.path,
            slide.mpp,
            names_path=not pseudonym_key,
            areas=areas_of(slide.slide_id, include, exclude, "" if pseudonym_key else slide.path.name),
            fallback_mpp=mpp,
        )
        for slide in named_slides(slides, cohort, pseudonym_key)
    ]
    if exclude and jobs and not any(job.areas.exclude or job.areas.fault for job in jobs):
        raise InputError(f"--exclude {exclude}: no file there belongs to a slide; name them {jobs[0].slide_id}.geojson")
    if shard is not None:
        jobs = shard_of(jobs, shard)
    # Progress is weighted by size. The largest slides come first, and a mere count would overestimate the time remaining.
    sizes = {job.slide_id: job.size_bytes or 1 for job in jobs}
    columns = ("{task.fields[slides]} of {task.fields[of]} slides", "{task.fields[speed]:.0f} tiles/s")
    with progress_on_terminal(*columns) as progress:
        task = progress.add_task("tiling", total=sum(sizes.values()), slides=0, of=len(jobs), speed=0.0)
        tiles = 0

        def show(outcome: Outcome) -> None:
            nonlocal tiles
            tiles += outcome.tiles if outcome.status == "tiled" else 0
            shown = progress.tasks[0]
            speed = tiles / (shown.elapsed or 1.0)
            progress.update(task, advance=sizes[outcome.slide_id], slides=shown.fields["slides"] + 1, speed=speed)

        outcomes = tile_slides(
            jobs,
            out,
            params,
            workers=workers,
            pixels="none" if no_pixels else pixels,
            executor=executor,
            limits=JobLimits(slide_timeout_s, slide_memory_gib),
            replace_features=replace,
            on_outcome=show,
        )
    _say_outcomes(outcomes, "tiled", out)


def overview(
    store: Annotated[Path, typer.Argument(help="the --out of crcjax tile")],
    cohort: Annotated[
        Path | None, typer.Option(help="CSV with slide_id, case_id, site and scanner: only its slides, by site")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DEGREES: by default max_stain_degrees=15, the largest angle between a slide's stains and the "
            "cohort's, and max_tile_degrees=10, between a tile's colour and every mixture of these; repeatable"
        ),
    ] = None,
) -> None:
    """Writes STORE/overview/index.html: the contact sheet, quality scores and QC status of every slide."""
    from crcjax.data.cohort import load_cohort
    from crcjax.slides.preprocess.qc_report import write_overview
    from crcjax.slides.tiling.quality_control import StainLimits, parse_limits

    limits = parse_limits(limit or (), StainLimits)
    rows = load_cohort(cohort, None).rows if cohort else ()
    places = {row.slide_id: ", ".join(filter(None, (row.site, row.scanner))) for row in rows}
    faults: dict[str, str] = {}
    page = write_overview(store, places if cohort else None, limits, on_fault=faults.__setitem__)
    for slide_id, reason in faults.items():
        STDERR.print(f"failed: {slide_id}: {reason}", markup=False)
    STDERR.print(f"{page}", markup=False)
    raise typer.Exit(1 if faults else 0)


def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE_OR_FOLDER...", help=".h5 of CLAM, TRIDENT or STAMP")],
    out: Annotated[Path, typer.Option(help="folder of the tile stores")],
    slides: Annotated[
        list[Path] | None,
        typer.Option(help="slide file, or folder to search; pixels are read from these slides; repeatable"),
    ] = None,
    cohort: Annotated[Path | None, typer.Option(help="CSV with slide_id, case_id and path of the slides")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="name of the features, by default the one that the file states")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="µm per level-0 pixel of all files, and of slides that state none")
    ] = None,
    side_px: Annotated[
        float | None, typer.Option(help="side of a tile in level-0 pixels, for files that do not state it")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="cores to use; all by default")] = None,
) -> None:
    """Imports other tools' tiles and features into a store that training reads (see docs/interchange.md).

    A file that contradicts its slide is refused. Run again, the command imports only the files that are missing.
    """
    from crcjax.data.slide_selection import named_slides
    from crcjax.slides.interchange.importer import import_files

    named = {slide.slide_id: slide for slide in named_slides(slides, cohort)} if slides or cohort else None
    with progress_on_terminal() as progress:
        task = progress.add_task("importing", total=None)
        outcomes = import_files(
            files,
            out,
            slides=None if named is None else {slide_id: slide.path for slide_id, slide in named.items()},
            slide_mpp={slide_id: slide.mpp for slide_id, slide in (named or {}).items() if slide.mpp},
            encoder=encoder,
            mpp=mpp,
            side_px=side_px,
            threads=workers,
            on_outcome=lambda outcome: progress.advance(task),
        )
    _say_outcomes(outcomes, "imported", out)


@audited("export")
def export(
    store: Annotated[Path, typer.Argument(help="the --out of crcjax tile or crcjax import")],
    out: Annotated[Path, typer.Option(help="folder of the files, one a slide")],
    layout: Annotated[
        Literal["geojson", "trident"], typer.Option("--format", help="for QuPath, or HDF5 coordinates for TRIDENT")
    ] = "geojson",
) -> None:
    """Writes the kept tiles of a store for other tools (see docs/interchange.md)."""
    from crcjax.slides.interchange.exporter import export_store

    _say_outcomes(export_store(store, out, layout), "exported", out)


def embed(
    store: Annotated[Path, typer.Argument(help="the --out of crcjax tile")],
    encoder: Annotated[str, typer.Option(help="a name of docs/encoders.md, such as uni2-h")],
    weights: Annotated[Path, typer.Option(help="the encoder's weights, a local .safetensors, .bin or .pth")],
    mag: Annotated[
        str | None, typer.Option(help="magnifications to encode; by default the nearest to the encoder's resolution")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="tiles per batch; by default as many as memory allows")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="type of the computation; by default float32 on CPUs and bfloat16 on other devices"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="threads that decode tiles; by default one per core")
    ] = None,
) -> None:
    """Encodes all tiles of a store with a published encoder, on all devices, and stores the features.

    The same command resumes an interrupted run.
    """
    from crcjax.predict.embed import View, embed_store

    with progress_on_terminal() as progress:
        task = progress.add_task("embedding", total=None)

        def start(view: View, slides: int, tiles: int) -> None:
            progress.update(task, total=slides)
            if view.warning:
                STDERR.print(f"warning: {view.warning}", markup=False)
            STDERR.print(f"{', '.join(view.magnifications)}, {tiles} tiles per batch", markup=False)

        outcomes = embed_store(
            store,
            encoder,
            weights,
            batch=batch,
            magnifications=mag.split(",") if mag else (),
            dtype=dtype,
            threads=workers,
            on_start=start,
            on_slide=lambda outcome: progress.advance(task),
        )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        STDERR.print(f"failed: {outcome.slide_id}: {outcome.reason}", markup=False)
    tiles, seconds = sum(outcome.tiles for outcome in outcomes), sum(outcome.seconds for outcome in outcomes)
    speed = f", {tiles / seconds:.1f} tiles/s" if seconds else ""
    done = f"{len(outcomes) - len(failed)} of {len(outcomes)} slides"
    STDERR.print(f"{done} have features of {encoder}{speed}", markup=False)
    raise typer.Exit(1 if failed else 0)


@audited("deidentify")
def deidentify(
    slides: Annotated[list[Path], typer.Argument(metavar="SLIDE_OR_FOLDER...", help="Aperio, tiled TIFF or DICOM")],
    out: Annotated[Path, typer.Option(help="the copy of one slide; with --pseudonym-key, the folder of all copies")],
    pseudonym_key: Annotated[
        Path | None, typer.Option(help="file of a secret key: each copy is named by its slide's pseudonym")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="slides at a time; as many as cores by default")] = None,
) -> None:
    """Copies slides without label, macro image and identifying tags; the pixels stay bit-identical.

    Each copy has a report beside it. Formats that cannot be copied safely are refused. The pixels are not searched for
    writing or pen marks. Run again, the command copies only the slides that are missing.
    """
    from crcjax.data.slide_selection import named_copies
    from crcjax.slides.deidentify.deidentify import Report, deidentify_slides, report_path
    from crcjax.slides.jobs.usable_cores import usable_cores
    from crcjax.slides.wsi.discovery import find_slides

    paths = find_slides(slides)
    copies = list(zip(paths, named_copies(paths, out, pseudonym_key), strict=True))
    # A file under a slide's pseudonym is a copy of that slide.
    jobs = [(path, copy) for path, copy in copies if not (pseudonym_key and copy.exists())]
    refused, streams = 0, []
    for path, copy, result in deidentify_slides(jobs, workers or usable_cores()):
        if not isinstance(result, Report):
            refused += 1
            STDERR.print(f"refused: {result if isinstance(result, SlideError) else f'{path}: {result}'}", markup=False)
            continue
        streams.append(result.streams)
        STDERR.print(f"{path}: copied to {copy}, report {report_path(copy).name}", markup=False)
        for removed in result.removed:
            STDERR.print(f"  removed: {removed}", markup=False)
        STDERR.print(f"  remains: {result.remains}", markup=False)
    record_details(slides=len(paths), copied=len(jobs) - refused, refused=refused, streams=streams)
    existing = f", {len(paths) - len(jobs)} copied before" if len(jobs) < len(paths) else ""
    STDERR.print(f"{len(jobs) - refused} of {len(paths)} slides copied{existing}", markup=False)
    raise typer.Exit(1 if refused else 0)


def pseudonyms(
    cohort: Annotated[Path, typer.Argument(help="CSV with slide_id and case_id")],
    pseudonym_key: Annotated[
        Path, typer.Option(help="file of a secret key of 32 bytes or more (openssl rand -hex 32)")
    ],
    out: Annotated[Path, typer.Option(help="the new CSV: pseudonyms, labels, site, scanner and split, no paths")],
    keep: Annotated[
        list[str] | None, typer.Option(help="a further column to keep, such as mpp; path is refused; repeatable")
    ] = None,
    label: Annotated[str, typer.Option(help="the column of the labels")] = "subtype",
) -> None:
    """Writes a cohort under the pseudonyms that `tile --pseudonym-key` and `predict --pseudonym-key` give."""
    from crcjax.data.pseudonyms import load_key, write_pseudonymous

    rows = write_pseudonymous(cohort, load_key(pseudonym_key), out, keep or (), label)
    STDERR.print(f"{rows} slides in {out}", markup=False)


def _say_outcomes(outcomes: Sequence[Outcome], done: str, out: Path) -> NoReturn:
    """A line for every outcome with a reason, and one for all, and their QC status; ends with the exit status."""
    for outcome in outcomes:
        if outcome.reason:
            said = ", ".join(filter(None, (outcome.status, outcome.verdict)))
            STDERR.print(f"{said}: {outcome.path}: {outcome.reason}", markup=False)
    succeeded, tiles = sum(outcome.succeeded for outcome in outcomes), sum(outcome.tiles for outcome in outcomes)
    record_details(slides=len(outcomes), succeeded=succeeded, manifest_sha256=digest_of(out / "manifest.jsonl"))
    STDERR.print(f"{succeeded} of {len(outcomes)} slides {done}, {tiles} tiles in {out}", markup=False)
    if verdicts := Counter(outcome.verdict for outcome in outcomes if outcome.verdict):
        counts = ", ".join(f"{name} {verdicts[name]}" for name in ("accept", "review", "reject"))
        STDERR.print(f"QC status: {counts}; crcjax overview {out} shows why", markup=False)
    raise typer.Exit(1 if succeeded < len(outcomes) else 0)
