// Presses every entry of every menu of the page's figure, and writes what is drawn after each as JSON into the page:
// [[[label, number of characters that draw points and lines, their hash], …], …], menu by menu. After a menu, its first
// entry is pressed again.
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const click = (element) => element.dispatchEvent(new MouseEvent("click", { bubbles: true }));

async function press(figure, menu, entry) {
  click(figure.querySelectorAll(".updatemenu-header")[menu]);
  await pause(300);
  const buttons = figure.querySelectorAll(".updatemenu-dropdown-button");
  const label = buttons[entry].textContent;
  click(buttons[entry]);
  await pause(300);
  return [label, buttons.length];
}

function drawn(figure) {
  // Points and lines beyond the panel are clipped away, so the places in the panel of a narrow axis do not count.
  const panels = [...figure.querySelectorAll(".cartesianlayer .subplot")].filter((panel) => {
    const name = panel.classList[1];
    const axis = figure._fullLayout[`xaxis${name.slice(1, name.indexOf("y"))}`];
    return axis._length > 1;
  });
  const shapes = (panel) => [...panel.querySelectorAll(".trace path")].map((path) => path.getAttribute("d") + path.getAttribute("transform"));
  return panels.flatMap(shapes).join("\n") + figure.querySelector(".ytitle")?.textContent;
}

async function pressAll() {
  const figure = document.querySelector(".plotly-graph-div");
  while (!figure._fullLayout?._subplots) await pause(50);
  await pause(500);
  const report = [];
  for (let menu = 0; menu < figure.querySelectorAll(".updatemenu-header").length; menu++) {
    const entries = [];
    for (let entry = 0, count = 1; entry < count; entry++) {
      const [label, buttons] = await press(figure, menu, entry);
      count = buttons;
      entries.push([label, drawn(figure)]);
    }
    await press(figure, menu, 0);
    report.push(entries);
  }
  const result = document.createElement("pre");
  result.id = "pressed";
  result.textContent = JSON.stringify(report.map((entries) => entries.map(([label, text]) => [label, text.length, hash(text)])));
  document.body.replaceChildren(result);
}

function hash(text) {
  let value = 0;
  for (const character of text) value = (value * 31 + character.codePointAt(0)) | 0;
  return value;
}

pressAll();
