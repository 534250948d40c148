// Turns files into images of a question.

// Returns {url, name, width, height} with a data URL.
// The model reads an image as it is stored. A photo that EXIF data rotate is therefore drawn
// upright first, so that the model, the boxes and this page mean the same image.
export async function imageFrom(file) {
  let stored, shown;
  try {
    stored = await createImageBitmap(file, { imageOrientation: "none" });
    shown = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${file.name} is no image that this browser can show. PNG and JPEG always work.`);
  }
  const same = stored.width === shown.width && miniature(stored) === miniature(shown);
  const blob = same ? file : await upright(shown, file.type);
  return { url: await dataUrl(blob), name: file.name, width: shown.width, height: shown.height };
}

function drawn(bitmap, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  return canvas;
}

function miniature(bitmap) {
  const { data } = drawn(bitmap, 16, 16).getContext("2d").getImageData(0, 0, 16, 16);
  return data.join();
}

function upright(bitmap, type) {
  const canvas = drawn(bitmap, bitmap.width, bitmap.height);
  return canvas.convertToBlob({ type: type === "image/png" ? type : "image/jpeg", quality: 0.95 });
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${blob.name} cannot be read.`));
    reader.readAsDataURL(blob);
  });
}
