// What the page does by itself: it gathers the palette's controls, lets a sample be chosen, holds the
// picture that chains start from, and reads the texts of saved pictures. The server judges all of it.
() => {
    const find = (selector) => document.querySelector(selector);
    const send = (name, text) => {
        const box = find(`#${name} textarea, #${name} input`);
        if (!box || box.value === text) return;
        box.value = text;
        box.dispatchEvent(new Event("input", { bubbles: true }));
    };

    // -- the palette --------------------------------------------------------------------------------

    let moves = 0;
    const gather = (moved) => {
        const palette = find(".palette");
        const family = palette.dataset.family;
        const panel = [...palette.querySelectorAll(".experts")].find((each) => each.dataset.family === family);
        const rows = {};
        for (const row of panel.querySelectorAll(".expert")) {
            const set = { on: row.querySelector("input[type=checkbox]").checked };
            const weight = row.querySelector("input[type=number]");
            if (weight && weight.value !== "") set.weight = weight.valueAsNumber;
            for (const kind of ["role", "value"]) {
                const chip = row.querySelector(`.${kind} input:checked`);
                if (chip) set[kind] = chip.value;
            }
            rows[row.dataset.name] = set;
        }
        send("chosen", JSON.stringify({ family, rows, moved, at: ++moves }));
    };
    const choose = (event) => {
        const input = event.target;
        const palette = input.closest(".palette");
        if (!palette) return;
        const family = input.name === "family";
        if (family) {
            palette.dataset.family = input.value;
            for (const each of palette.querySelectorAll(".experts")) each.hidden = each.dataset.family !== input.value;
        }
        if (input.type === "range") input.nextElementSibling.value = input.value;
        if (input.type === "number") input.previousElementSibling.value = input.value;
        gather(family ? "family" : "");
    };
    document.addEventListener("input", choose);
    new MutationObserver(() => { // written anew: nodes are kept, and with them what was set by hand
        for (const input of document.querySelectorAll(".palette input")) {
            if (input.type === "radio" || input.type === "checkbox") input.checked = input.hasAttribute("checked");
            else input.value = input.getAttribute("value");
        }
    }).observe(find("#palette"), { subtree: true, childList: true, attributes: true, attributeFilter: ["data-serial"] });

    // -- choosing a sample ----------------------------------------------------------------------------

    const GAP = 1; // pixels between pictures
    let chosen = -1;
    const places = () => {
        const image = find("#picture img");
        if (!image) return null;
        const count = Number(image.dataset.count);
        const columns = Math.ceil(Math.sqrt(count));
        const rows = Math.ceil(count / columns);
        const width = (image.naturalWidth + GAP) / columns - GAP;
        const height = (image.naturalHeight + GAP) / rows - GAP;
        return { image, count, columns, rows, width, height };
    };
    const area = (at) => { // of the picture within its box, which may be wider
        const box = at.image.getBoundingClientRect();
        const scale = Math.min(box.width / at.image.naturalWidth, box.height / at.image.naturalHeight);
        const wide = at.image.naturalWidth * scale;
        const [across] = getComputedStyle(at.image).objectPosition.split(" ");
        return { left: box.left + ((box.width - wide) * parseFloat(across)) / 100, top: box.top, scale };
    };
    const crop = (at, index) => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [at.width, at.height];
        const x = (index % at.columns) * (at.width + GAP);
        const y = Math.floor(index / at.columns) * (at.height + GAP);
        canvas.getContext("2d").drawImage(at.image, x, y, at.width, at.height, 0, 0, at.width, at.height);
        return canvas.toDataURL("image/png");
    };
    const mark = () => {
        const at = places();
        const frame = find("#picture");
        let ring = find("#picture-ring");
        if (!ring) {
            ring = Object.assign(document.createElement("div"), { id: "picture-ring", role: "status" });
            frame.append(ring);
        }
        if (!at || chosen < 0 || chosen >= at.count) { ring.hidden = true; return; }
        const place = area(at);
        const box = frame.getBoundingClientRect();
        const x = (chosen % at.columns) * (at.width + GAP) * place.scale;
        const y = Math.floor(chosen / at.columns) * (at.height + GAP) * place.scale;
        Object.assign(ring.style, {
            left: `${place.left - box.left + x}px`, top: `${place.top - box.top + y}px`,
            width: `${at.width * place.scale}px`, height: `${at.height * place.scale}px`,
        });
        const says = `Sample ${chosen + 1} of ${at.count} is chosen`;
        if (ring.getAttribute("aria-label") !== says) ring.setAttribute("aria-label", says);
        ring.hidden = false;
    };
    const look = () => {
        const at = places();
        if (!at || chosen < 0 || chosen >= at.count || !at.image.complete) return;
        send("look", JSON.stringify({ chain: chosen, picture: crop(at, chosen) }));
    };
    const select = (index) => { chosen = index; mark(); look(); };
    document.addEventListener("click", (event) => {
        const at = places();
        if (!at || event.target !== at.image) return;
        const place = area(at);
        const column = Math.floor((event.clientX - place.left) / place.scale / (at.width + GAP));
        const row = Math.floor((event.clientY - place.top) / place.scale / (at.height + GAP));
        const index = row * at.columns + column;
        if (column >= 0 && column < at.columns && index >= 0 && index < at.count) select(index);
    });
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: "up", ArrowDown: "down" };
    const onKey = (event) => {
        const at = places();
        if (!at || event.target.id !== "picture" || !(event.key in step)) return;
        event.preventDefault();
        const by = { up: -at.columns, down: at.columns }[step[event.key]] ?? step[event.key];
        const next = chosen < 0 ? 0 : chosen + by;
        if (next >= 0 && next < at.count) select(next);
    };
    document.addEventListener("keydown", onKey);
    const frame = find("#picture");
    frame.tabIndex = 0;
    frame.setAttribute("role", "group");
    frame.setAttribute("aria-label", "Samples. Arrow keys choose one.");
    new MutationObserver((changes) => {
        if (changes.every((change) => change.target.id === "picture-ring" || change.target.id === "picture")) return;
        const image = find("#picture img");
        if (image && !image.complete) image.addEventListener("load", mark, { once: true });
        mark();
    }).observe(frame, { subtree: true, childList: true });
    window.addEventListener("resize", mark);
    setInterval(() => { if (chosen >= 0 && !document.hidden) look(); }, 2500); // what pushes now

    // -- the picture to start from ----------------------------------------------------------------------

    const SIDE = 256; // of the easel; the server scales down
    const paint = document.createElement("canvas");
    paint.width = paint.height = SIDE;
    let picture = null;
    let painted = false;
    const brush = { x: SIDE / 2, y: SIDE / 2, shown: false };
    const radius = () => Number(find("#brush")?.value ?? 3) * 6;
    const says = (text) => { const line = find("#start-says"); if (line) line.textContent = text; };
    const draw = () => {
        const easel = find("#easel");
        if (!easel) return;
        const pen = easel.getContext("2d");
        pen.clearRect(0, 0, SIDE, SIDE);
        pen.imageSmoothingEnabled = false;
        if (picture) pen.drawImage(picture, 0, 0, SIDE, SIDE);
        pen.globalAlpha = 0.5;
        pen.drawImage(paint, 0, 0);
        pen.globalAlpha = 1;
        if (!brush.shown || !picture) return;
        pen.strokeStyle = "#fff";
        pen.lineWidth = 3;
        pen.beginPath();
        pen.arc(brush.x, brush.y, radius(), 0, 7);
        pen.stroke();
        pen.strokeStyle = "#000";
        pen.lineWidth = 1;
        pen.stroke();
    };
    const hand = () => send("start", picture ? JSON.stringify({
        picture: picture.toDataURL("image/png"), mask: painted ? paint.toDataURL("image/png") : "",
    }) : "");
    const unpaint = () => {
        paint.getContext("2d").clearRect(0, 0, SIDE, SIDE);
        painted = false;
        draw();
        hand();
    };
    const begin = (source, width, height, text) => { // the middle of it, as a square
        const side = Math.min(width, height);
        picture = document.createElement("canvas");
        picture.width = picture.height = Math.min(side, SIDE);
        const pen = picture.getContext("2d");
        pen.imageSmoothingQuality = "high";
        pen.drawImage(source, (width - side) / 2, (height - side) / 2, side, side, 0, 0, picture.width, picture.width);
        unpaint();
        says(text);
    };
    const stroke = (x, y, erase) => {
        if (!picture) return;
        const pen = paint.getContext("2d");
        pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
        pen.fillStyle = "#ff2d95";
        pen.beginPath();
        pen.arc(x, y, radius(), 0, 7);
        pen.fill();
        painted = pen.getImageData(0, 0, SIDE, SIDE).data.some((value) => value);
        draw();
    };
    const reach = (event) => {
        const box = find("#easel").getBoundingClientRect();
        brush.x = ((event.clientX - box.left) / box.width) * SIDE;
        brush.y = ((event.clientY - box.top) / box.height) * SIDE;
    };
    let pressed = false;
    document.addEventListener("pointerdown", (event) => {
        if (event.target.id !== "easel") return;
        pressed = true;
        reach(event);
        stroke(brush.x, brush.y, event.shiftKey);
    });
    document.addEventListener("pointermove", (event) => {
        if (event.target.id !== "easel") { if (brush.shown && !pressed) { brush.shown = false; draw(); } return; }
        brush.shown = true;
        reach(event);
        if (pressed) stroke(brush.x, brush.y, event.shiftKey);
        else draw();
    });
    document.addEventListener("pointerup", () => { if (pressed) { pressed = false; hand(); } });
    document.addEventListener("keydown", (event) => {
        if (event.target.id !== "easel") return;
        const moves = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] };
        if (event.key in moves) {
            brush.shown = true;
            brush.x = Math.min(Math.max(brush.x + moves[event.key][0], 0), SIDE);
            brush.y = Math.min(Math.max(brush.y + moves[event.key][1], 0), SIDE);
            draw();
        } else if (event.key === " " || event.key === "Backspace") {
            stroke(brush.x, brush.y, event.key === "Backspace");
            hand();
        } else return;
        event.preventDefault();
    });
    document.addEventListener("click", (event) => {
        if (event.target.id === "unpaint") unpaint();
        if (event.target.id === "start-noise") { picture = null; unpaint(); says("Chains start from noise."); }
        if (event.target.id !== "start-chain") return;
        const at = places();
        if (!at || chosen < 0 || chosen >= at.count) { says("Choose a sample in the picture first."); return; }
        const image = new Image();
        image.onload = () => begin(image, image.width, image.height, `Chains start from sample ${chosen + 1}.`);
        image.src = crop(at, chosen);
    });
    const upload = async (file) => {
        try {
            const image = await createImageBitmap(file);
            begin(image, image.width, image.height, `Chains start from ${file.name}.`);
        } catch {
            says(`${file.name} is no picture that can be read; give a PNG, JPEG or WebP.`);
        }
    };
    new MutationObserver(() => { // a picture of the data, and a film that is ready
        const image = find("#example img.example:not([data-seen])");
        if (image) {
            image.dataset.seen = "yes";
            image.decode().then(() => begin(image, image.naturalWidth, image.naturalHeight, image.alt));
        }
        const film = find("#film a.film:not([data-seen])");
        if (film) { film.dataset.seen = "yes"; film.click(); }
        const easel = find("#easel:not([data-seen])");
        if (easel) { easel.dataset.seen = "yes"; draw(); }
    }).observe(document.body, { subtree: true, childList: true });

    // -- saved pictures: their texts, dropped anywhere or chosen; the picture itself never leaves ---------

    const START = 1 << 18; // the texts stand before the pixels
    const tell = (content) => send("dropped", JSON.stringify({ ...content, at: Date.now() }));
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
        const file = event.target.files?.[0];
        if (event.target.id === "open-picture") open(file);
        else if (event.target.id === "start-file" && file) upload(file);
        else return;
        event.target.value = "";
    });
}
