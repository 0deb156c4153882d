"""The picture of a soak: requests and memory over time."""

from mos_jax.reporting.style import PALETTE, new_figure, styled


@styled
def soak_picture(report):
    """Requests that are open and that were accepted, and the memory of the process."""
    from matplotlib.ticker import StrMethodFormatter

    figure = new_figure(9.6, 5.2)
    load, memory = figure.subplots(2, 1, sharex=True)
    minutes = [sample.seconds / 60 for sample in report.samples]
    load.plot(minutes, [sample.accepted for sample in report.samples], color=PALETTE[0])
    load.set_ylabel("requests accepted", color=PALETTE[0])
    beside = load.twinx()
    beside.spines["right"].set_visible(True)
    beside.plot(minutes, [s.open for s in report.samples], color=PALETTE[1], linewidth=0.5)
    beside.set_ylabel("open at the moment", color=PALETTE[1])
    beside.set_ylim(bottom=0)
    load.set_ylim(bottom=0)
    load.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    memory.plot(minutes, [s.resident / 2**20 for s in report.samples], color=PALETTE[2])
    memory.set_ylabel("resident memory, MiB")
    memory.set_ylim(0, 1.15 * max(sample.resident for sample in report.samples) / 2**20)
    memory.set_xlabel("minutes")
    numbers = report.numbers
    load.set_title(
        f"{numbers['sent']:,} requests sent, {numbers['accepted']:,} accepted, each ended once; "
        f"{numbers['evictions']:,} evictions, {numbers['disturbances']:,} folders disturbed"
    )
    first, last = numbers["device_bytes"]
    memory.set_title(f"arrays on the device: {first:,} bytes before, {last:,} after")
    return figure
