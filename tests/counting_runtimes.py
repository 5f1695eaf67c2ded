"""A runtime for one made-up chip, whose compiler a test writes."""

from qinvert.export.runtimes import Runtime

LOADING = "with a loader"


def kept_files(content, request):
    """Write the graph as what the compiler made, if it is to be kept; return the file and how to load it."""
    if request.keep is None:
        return {}
    (request.keep / "chip.bin").write_bytes(content)
    return {str(request.keep / "chip.bin"): LOADING}


def counting_runtime(execute, compiles):
    """A runtime that is installed everywhere, with a compiler for ``chip``."""
    return Runtime(
        name="counting", execute=execute, summary="", module="json", requirement="", compile=compiles,
        hardware={"chip": "Chip"}, loading=LOADING,
    )  # fmt: skip
