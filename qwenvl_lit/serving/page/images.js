// Turns files into images of a question.

const ORIENTATION = 0x0112; // the EXIF tag

// Returns {url, name, width, height} with a data URL.
// The model reads an image as it is stored, and browsers turn photos as their EXIF data say. Such a
// photo is drawn upright first, so that the model, its boxes and this page mean the same image.
export async function imageFrom(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} is no image that this browser can show. Use PNG or JPEG.`);
  }
  const { width, height } = bitmap;
  const blob = (await orientationOf(file)) === 1 ? file : await drawn(bitmap);
  return { url: await dataUrl(blob), name: file.name, width, height };
}

// Returns the EXIF orientation of a JPEG file, or 1, which means upright.
async function orientationOf(file) {
  const view = new DataView(await file.slice(0, 1 << 17).arrayBuffer());
  const last = view.byteLength - 12; // where an entry can begin
  const text = new TextDecoder("latin1").decode(view);
  const tiff = text.indexOf("Exif\0\0") + 6;
  if (!text.startsWith("\xff\xd8") || tiff < 6 || tiff > last) return 1;
  const isLittle = view.getUint16(tiff) === 0x4949;
  const table = tiff + view.getUint32(tiff + 4, isLittle);
  const count = table <= last ? view.getUint16(table, isLittle) : 0;
  for (let i = 0, at = table + 2; i < count && at <= last; i++, at += 12) {
    if (view.getUint16(at, isLittle) === ORIENTATION) return view.getUint16(at + 8, isLittle);
  }
  return 1;
}

function drawn(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
