"""Check in Chromium that notebook 01 runs in JupyterLab from start to end: figures are drawn, bars and menus work.

python .ci/browser.py

Needs the dev extra. Where no Chrome or Chromium is installed, the check is skipped with a line that says so. If it
fails, a screenshot and the page are kept in a temporary folder.
"""

import asyncio
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from choreographer import Browser
from choreographer.browsers.chromium import Chromium

NOTEBOOK = Path(__file__).parents[1] / "notebooks/01_tour.ipynb"
PLOTLY = "application/vnd.plotly.v1+json"
SECONDS = 900

RUN = """(async () => {
  const app = window.jupyterapp;
  if (!app || !document.querySelector(".jp-Notebook .jp-CodeCell")) return "loading";
  const panel = app.shell.currentWidget;
  await panel.sessionContext.ready;
  window.ended = "";
  app.commands.execute("notebook:run-all-cells").then(
    () => { window.ended = "ended"; }, error => { window.ended = `${error}`; });
  return "running";
})()"""
"""Start all cells of the notebook that is open."""

EXPLORER = nbformat.v4.new_code_cell("gk.explore(spectra[0])")
"""A cell that is added at the end."""

CHOOSE = """(() => {
  const figure = [...document.querySelectorAll(".js-plotly-plot")].at(-1);
  const drawn = () => [...figure.querySelectorAll(".cartesianlayer .trace")].map(trace => trace.innerHTML).join();
  const before = drawn();
  const press = found => found.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  press(figure.querySelector(".updatemenu-header"));
  press([...figure.querySelectorAll(".updatemenu-dropdown-button")].at(1));
  return new Promise(done => setTimeout(() => done(before !== drawn() && drawn().length > 0), 2000));
})()"""
"""Choose the second entry of the first menu of the last figure; true if that changes what is drawn."""

STATE = """JSON.stringify({
  ended: window.ended,
  bars: [...document.querySelectorAll(".jp-OutputArea .progress-bar, .jp-OutputArea progress")].map(
    bar => bar.style.width || String(bar.value)),
  errors: window.jupyterapp.shell.currentWidget.content.model.toJSON().cells.flatMap(
    cell => (cell.outputs || []).filter(output => output.output_type === "error").map(
      output => `${output.ename}: ${output.evalue}`)),
  running: [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].filter(
    prompt => prompt.innerText.includes("*")).length,
  figures: [...document.querySelectorAll(".js-plotly-plot")].map(
    figure => figure.querySelectorAll("svg .trace, svg .hm, svg .bars, svg .scatter").length),
})"""
"""What the page shows."""


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """Serve a folder by JupyterLab inside the block; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = folder / ".settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))  # else cells out of sight are not on the page
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--expose-app-in-browser",
        "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"), "OMP_NUM_THREADS": "1"}
    log = (folder / "jupyterlab.log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: S603 - our own command
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


async def value_of(tab: Any, expression: str) -> Any:
    """Return the value of an expression of JavaScript on the page."""
    options = {"expression": expression, "awaitPromise": True, "returnByValue": True}
    answer = await tab.send_command("Runtime.evaluate", params=options)
    return answer.get("result", {}).get("result", {}).get("value")


async def check(address: str, folder: Path, figures: int) -> list[str]:
    """Return what is wrong with the notebook after it was run in JupyterLab."""
    async with Browser() as browser:
        tab = await browser.create_tab()
        size = {"width": 1400, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        await tab.send_command("Emulation.setDeviceMetricsOverride", params=size)
        await tab.send_command("Page.navigate", params={"url": f"{address}/lab/tree/{NOTEBOOK.name}"})
        deadline, state, seen = time.monotonic() + SECONDS, {}, set()
        while await value_of(tab, RUN) != "running":
            if time.monotonic() > deadline - SECONDS + 120:
                await keep(tab, folder)
                return ["JupyterLab did not open the notebook in two minutes"]
            await asyncio.sleep(1)
        while time.monotonic() < deadline and not (state.get("ended") and not state["running"]):
            await asyncio.sleep(0.5)
            state = json.loads(await value_of(tab, STATE) or "{}")
            seen.update(state.get("bars", ()))
        await asyncio.sleep(2)
        state = json.loads(await value_of(tab, STATE) or "{}")
        wrong = []
        if state.get("ended") != "ended" or state["running"]:
            wrong.append(f"expected all cells to be run in {SECONDS} s, found: {state.get('ended') or 'still running'}")
        wrong += [f"expected no error, found: {error}" for error in state.get("errors", ())]
        drawn = [marks for marks in state.get("figures", ()) if marks]
        if len(drawn) != figures:
            wrong.append(f"expected {figures} figures with traces, found traces in figures: {state.get('figures')}")
        if not await value_of(tab, CHOOSE):
            wrong.append("expected a menu of the explorer to change what is drawn, found no change")
        if len(seen) < 3:
            wrong.append(f"expected a bar that moves, found these lengths: {sorted(seen)}")
        if wrong:
            await keep(tab, folder)
        return wrong


async def keep(tab: Any, folder: Path) -> None:
    """Keep a screenshot and the page."""
    shot = await tab.send_command("Page.captureScreenshot", params={"captureBeyondViewport": True})
    (folder / "page.png").write_bytes(base64.b64decode(shot["result"]["data"]))
    (folder / "page.html").write_text(await value_of(tab, "document.documentElement.outerHTML") or "")


def main() -> None:
    """Run the check, or say why not."""
    if Chromium.find_browser(skip_local=False) is None:
        sys.stdout.write("skipped: no Chrome or Chromium is installed\n")
        return
    folder = Path(tempfile.mkdtemp(prefix="geomkit-browser-"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    figures = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            figures += sum(PLOTLY in output.get("data", {}) for output in cell.outputs)
            cell.outputs, cell.execution_count = [], None
    notebook.cells.append(EXPLORER)
    figures += 1
    nbformat.write(notebook, folder / NOTEBOOK.name)
    with jupyterlab(folder) as address:
        wrong = asyncio.run(check(address, folder, figures))
    if wrong:
        raise SystemExit("\n".join([*wrong, f"the page is kept in {folder}"]))
    shutil.rmtree(folder)
    sys.stdout.write(f"{NOTEBOOK.name} in JupyterLab: {figures} figures drawn, no error, bars and a menu moved\n")


if __name__ == "__main__":
    main()
