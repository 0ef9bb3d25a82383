// Saved pictures: their texts are read here; the picture itself need not leave.
const START = 1 << 18; // the texts stand before the pixels

/** The texts of a PNG, by key; none of what is no PNG. */
export const texts = async (file) => {
    const bytes = new Uint8Array(await file.slice(0, START).arrayBuffer());
    const view = new DataView(bytes.buffer);
    const latin = (from, to) => String.fromCharCode(...bytes.subarray(from, to));
    const found = {};
    if (latin(1, 4) !== "PNG") return found;
    for (let at = 8; at + 12 <= bytes.length; ) {
        const [size, kind] = [view.getUint32(at), latin(at + 4, at + 8)];
        const [start, end] = [at + 8, at + 8 + size];
        if (kind === "IDAT" || end > bytes.length) break;
        const split = bytes.indexOf(0, start);
        if ((kind === "iTXt" || kind === "tEXt") && split > start && split < end) {
            const key = latin(start, Math.min(split, start + 80));
            let from = split + 1;
            if (kind === "iTXt") {
                if (bytes[from]) { at = end + 4; continue; } // compressed: none of ours
                from = bytes.indexOf(0, bytes.indexOf(0, from + 2) + 1) + 1;
            }
            found[key] = new TextDecoder().decode(bytes.subarray(from, end));
        }
        at = end + 4;
    }
    return found;
};

/** The middle of a picture file as a square data URI, no larger than the server needs. */
export const square = async (file, side = 256) => {
    const image = await createImageBitmap(file);
    const edge = Math.min(image.width, image.height);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = Math.min(edge, side);
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(image, (image.width - edge) / 2, (image.height - edge) / 2, edge, edge, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/png");
};
