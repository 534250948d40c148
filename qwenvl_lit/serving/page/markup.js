// Reads the markup <ref>label</ref><box>(x0,y0),(x1,y1)</box>, on the grid 0..999, as grounding.py.

const GRID = 999;
const NUMBER = "[\\s()]*[+-]?\\d{1,6}[\\s()]*";
const REGION = `<box>${NUMBER}(?:,${NUMBER}){3}</box>|<quad>${NUMBER}(?:,${NUMBER}){7}</quad>`;
const OBJECT = new RegExp(`<ref>((?:(?!</ref>)[^])*)</ref>((?:${REGION})*)|((?:${REGION})+)`, "g");
const PARTIAL_TAG = /<\/?(?:r|re|ref|b|bo|box|q|qu|qua|quad)?$/;
const OPEN_REGION = /<(box|quad)>(?:(?!<\/\1>)[^])*$/;
const OPEN_LABEL = /<ref>(?![^]*<\/ref>)/;

// Splits text into strings and objects {label, regions}; a region is 4 or 8 numbers on the grid.
// Without `complete`, the unfinished markup at the end of the text is left out.
export function parse(text, complete) {
  if (!complete) {
    text = text.replace(PARTIAL_TAG, "").replace(OPEN_REGION, "").replace(OPEN_LABEL, "");
  }
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(OBJECT)) {
    if (match.index > end) parts.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    const regions = [];
    for (const [region] of (match[2] ?? match[3]).matchAll(new RegExp(REGION, "g"))) {
      regions.push(region.match(/[+-]?\d+/g).map(Number));
    }
    parts.push({ label: match[1] ?? null, regions });
  }
  if (end < text.length) parts.push(text.slice(end));
  return parts;
}

// Returns the parts of an answer. Its objects become {label, image, regions}. A region has points
// [x, y], two of a box, four of a quad or one; left, top, width and height within the image; all as
// fractions of the image; and the points in pixels as text, `at`. The server's boxes, in pixels,
// take precedence over the grid's. If the complete text has no markup, as with JSON or points, the
// server's objects follow it.
export function partsOf(answer, images, complete) {
  const parts = parse(answer.text, complete);
  const objects = parts.filter((part) => typeof part !== "string");
  const boxed = objects.filter((object) => object.regions.length);
  const count = answer.objects?.length;
  const reported = [objects, boxed].find((list) => list.length === count) ?? [];
  for (const object of objects) {
    const given = answer.objects?.[reported.indexOf(object)];
    object.image = given?.image ?? images.length - 1;
    const size = images[object.image] ?? { width: 0, height: 0 };
    const grid = { width: GRID, height: GRID };
    object.regions = object.regions.map((values, k) => {
      const pixels = values.length === 4 && given?.boxes?.[k];
      return pixels ? regionOf(pixels, size, size) : regionOf(values, grid, size);
    });
  }
  if (complete && !objects.length) {
    for (const given of answer.objects ?? []) {
      const size = images[given.image];
      if (!size || !given.boxes.length) continue;
      const regions = given.boxes.map((pixels) => regionOf(pixels, size, size));
      parts.push(" ", { label: given.label, image: given.image, regions });
    }
  }
  return parts;
}

function regionOf(values, frame, size) {
  const points = [];
  for (let n = 0; n < values.length; n += 2) {
    points.push([values[n] / frame.width, values[n + 1] / frame.height]);
  }
  const xs = points.map(([x]) => Math.min(1, Math.max(0, x)));
  const ys = points.map(([, y]) => Math.min(1, Math.max(0, y)));
  const [left, top] = [Math.min(...xs), Math.min(...ys)];
  const [width, height] = [Math.max(...xs) - left, Math.max(...ys) - top];
  const at = points.map(
    ([x, y]) => `(${Math.round(x * size.width)}, ${Math.round(y * size.height)})`,
  );
  return { points, left, top, width, height, at: at.join(" to ") };
}
