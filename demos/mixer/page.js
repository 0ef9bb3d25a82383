// Reads the texts of a saved picture, dropped anywhere or chosen, and hands them to the server, which
// judges them. The picture itself never leaves the browser.
() => {
    const START = 1 << 18; // the texts stand before the pixels
    const tell = (content) => {
        const box = document.querySelector("#dropped textarea");
        box.value = JSON.stringify({ ...content, at: Date.now() });
        box.dispatchEvent(new Event("input", { bubbles: true }));
    };
    const texts = (bytes) => {
        const view = new DataView(bytes.buffer);
        const latin = (from, to) => String.fromCharCode(...bytes.subarray(from, to));
        const found = {};
        if (latin(1, 4) !== "PNG") return found;
        for (let at = 8; at + 12 <= bytes.length; ) {
            const [size, kind] = [view.getUint32(at), latin(at + 4, at + 8)];
            const [start, end] = [at + 8, at + 8 + size];
            if (kind === "IDAT" || end > bytes.length) break;
            let split = bytes.indexOf(0, start);
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
    const open = async (file) => {
        if (file) tell(texts(new Uint8Array(await file.slice(0, START).arrayBuffer())));
    };
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
        event.preventDefault();
        open(event.dataTransfer.files[0]);
    });
    document.addEventListener("change", (event) => {
        if (event.target.id !== "open-picture") return;
        open(event.target.files[0]);
        event.target.value = "";
    });
}
