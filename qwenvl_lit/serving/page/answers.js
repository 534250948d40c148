// Draws answers: their text, in which labels are buttons, and the images with boxes. All text of
// users and models becomes text nodes.

import { partsOf } from "./markup.js";

const COLORS = 7; // classes color-0 to color-6 of page.css
const CROWDED = 12; // more boxes on an image show their labels only when lit

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export class AnswerView {
  constructor() {
    this.text = element("div", { className: "text" });
    this.figures = element("div", { className: "figures" });
    this.node = element("div", { className: "body" }, this.text, this.figures);
    this.shown = [];
    for (const [type, isOn] of [
      ["pointerover", true], ["pointerout", false], ["focusin", true], ["focusout", false],
    ]) {
      this.node.addEventListener(type, ({ target }) => this.light(target, isOn));
    }
    // A tap focuses a button in all browsers but Safari.
    this.node.addEventListener("click", ({ target }) => target.closest("[data-object]")?.focus());
  }

  // Shows an answer to the last question of `images`. Only parts that changed are drawn again.
  show(answer, images, { complete, raw }) {
    const parts = raw ? [answer.text] : partsOf(answer, images, complete);
    const objects = parts.filter((part) => typeof part !== "string");
    const keys = parts.map((part) => JSON.stringify(part));
    parts.forEach((part, i) => {
      if (keys[i] === this.shown[i]) return;
      const node = typeof part === "string"
        ? element("span", { textContent: part })
        : this.label(part, objects.indexOf(part), images);
      if (i < this.text.childNodes.length) this.text.childNodes[i].replaceWith(node);
      else this.text.append(node);
    });
    while (this.text.childNodes.length > parts.length) this.text.lastChild.remove();
    this.shown = keys;
    const drawn = JSON.stringify(objects.filter((object) => object.regions.length));
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const figures = [];
    images.forEach((image, i) => {
      const boxes = boxesOn(i, objects);
      if (boxes.length) figures.push(figure(image, `Image ${i + 1}`, boxes));
    });
    this.figures.replaceChildren(...figures);
  }

  label(object, index, images) {
    const textContent = object.label ?? nameOf(object.regions[0]);
    const isDrawn = object.regions.length > 0 && images[object.image];
    if (!isDrawn) return element("span", { textContent });
    const at = object.regions.map((region) => region.at).join("; ");
    const title = `Image ${object.image + 1}: ${at} pixels`;
    // A span, because a button does not break over two lines.
    const properties = { className: "label", role: "button", tabIndex: 0, title, textContent };
    return mark(element("span", properties), index);
  }

  light(target, isOn) {
    const index = target.closest?.("[data-object]")?.dataset.object;
    this.node.classList.toggle("lighting", isOn && index !== undefined);
    for (const node of this.node.querySelectorAll("[data-object]")) {
      node.classList.toggle("lit", isOn && node.dataset.object === index);
    }
  }
}

function mark(node, index) {
  node.dataset.object = index;
  node.classList.add(`color-${index % COLORS}`);
  if (index >= COLORS) node.classList.add("dashed");
  return node;
}

function nameOf(region) {
  return region?.points.length === 1 ? "point" : "box";
}

// Returns the boxes on one image, large ones first, so that small ones lie on top.
function boxesOn(image, objects) {
  const boxes = [];
  objects.forEach(({ label, image: place, regions }, index) => {
    if (place !== image) return;
    for (const region of regions) boxes.push({ ...region, label: label ?? nameOf(region), index });
  });
  return boxes.sort((a, b) => b.width * b.height - a.width * a.height);
}

function figure(image, name, boxes) {
  const shown = element("img", { src: image.url, alt: name });
  const frame = element("div", { className: "frame" }, shown);
  const ratio = image.width / image.height;
  frame.style.setProperty("--ratio", ratio);
  frame.classList.toggle("narrow", ratio < 0.6);
  frame.classList.toggle("crowded", boxes.length > CROWDED);
  frame.append(...boxes.map(boxButton));
  return element("figure", {}, frame);
}

function boxButton(box) {
  const tag = element("span", { className: "tag", textContent: box.label });
  const ariaLabel = `${box.label}: ${box.at} pixels`;
  const properties = { type: "button", className: "box", ariaLabel };
  const button = mark(element("button", properties, tag), box.index);
  const isPoint = box.points.length === 1;
  button.classList.toggle("point", isPoint);
  const sides = isPoint ? ["left", "top"] : ["left", "top", "width", "height"];
  for (const side of sides) button.style[side] = `${box[side] * 100}%`;
  button.classList.toggle("inside", box.top < 0.08);
  button.classList.toggle("from-right", box.left > 0.6);
  if (box.points.length === 4) button.append(outline(box));
  return button;
}

// Returns the outline of a quad, as an SVG that fills its button.
function outline({ points, left, top, width, height }) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `${left} ${top} ${width || 1} ${height || 1}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const polygon = document.createElementNS(svg.namespaceURI, "polygon");
  polygon.setAttribute("points", points.join(" "));
  svg.append(polygon);
  return svg;
}
