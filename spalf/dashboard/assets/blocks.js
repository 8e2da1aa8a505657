"use strict";
// The page's data: JSON, compressed (zlib) and written as base64 into script elements that the
// browser does not run. A block is unpacked when it is first asked for.

const summary = JSON.parse(document.getElementById("summary").textContent);

const KEPT_BLOCKS = 48;
const unpackedBlocks = new Map(); // id -> promise of its content, the latest used last

async function unpack(id) {
  const packed = atob(document.getElementById(id).textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const content = await new Response(stream).json();
  performance.mark(`block ${id}`);
  return content;
}

function block(id) {
  const known = unpackedBlocks.get(id) ?? unpack(id);
  unpackedBlocks.delete(id);
  unpackedBlocks.set(id, known);
  if (unpackedBlocks.size > KEPT_BLOCKS) {
    unpackedBlocks.delete(unpackedBlocks.keys().next().value);
  }
  return known;
}

// The item with this index of "features" or "sequences".
async function item(kind, index) {
  const perBlock = summary.per_block[kind];
  const content = await block(`${kind}-${Math.floor(index / perBlock)}`);
  return content[index % perBlock];
}
