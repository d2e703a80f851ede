// A layered layout of a small directed graph: ranks by longest path, long edges through waypoints, few crossings.
const NODE_HEIGHT = 38, RANK_GAP = 26, SIDE_GAP = 16, WAYPOINT = 10;

// nodes: [{width}], edges: [[from, to, ...]] by position. Returns places [{x, y}] (centres), routes [[{x, y}...]] and the size.
function layout(nodes, edges) {
  const rank = ranks(nodes.length, edges);
  const places = nodes.map((node, i) => ({ width: node.width, rank: rank[i], near: [] }));
  const routes = edges.map(([from, to]) => {
    const stops = [places[from]];
    for (let r = rank[from] + 1; r < rank[to]; r++) {
      const stop = { width: WAYPOINT, rank: r, near: [] };
      places.push(stop);
      stops.push(stop);
    }
    stops.push(places[to]);
    for (let i = 1; i < stops.length; i++) {
      stops[i - 1].near.push(stops[i]);
      stops[i].near.push(stops[i - 1]);
    }
    return stops;
  });
  const layers = [];
  for (const place of places) (layers[place.rank] = layers[place.rank] || []).push(place);
  spread(layers);
  for (let sweep = 0; sweep < 8; sweep++) {
    const order = sweep % 2 ? [...layers].reverse() : layers;
    for (const layer of order) arrange(layer, sweep % 2 ? 1 : -1);
  }
  for (let round = 0; round < 30; round++) for (const layer of round % 2 ? [...layers].reverse() : layers) settle(layer);
  const left = Math.min(...places.map((p) => p.x - p.width / 2)), right = Math.max(...places.map((p) => p.x + p.width / 2));
  for (const place of places) {
    place.x += 8 - left;
    place.y = 4 + NODE_HEIGHT / 2 + place.rank * (NODE_HEIGHT + RANK_GAP);
  }
  return { places: places.slice(0, nodes.length), routes, width: right - left + 16, height: layers.length * (NODE_HEIGHT + RANK_GAP) };
}

function ranks(count, edges) {
  const rank = new Array(count).fill(0);
  for (let round = 0; round < count; round++) {
    let moved = false;
    for (const [from, to] of edges) {
      if (rank[to] < rank[from] + 1) {
        rank[to] = rank[from] + 1;
        moved = true;
      }
    }
    if (!moved) break;
  }
  return rank;
}

function spread(layers) {
  for (const layer of layers) {
    let x = 0;
    for (const place of layer) {
      place.x = x + place.width / 2;
      x += place.width + SIDE_GAP;
    }
  }
}

// Order a layer by where its neighbours on one side are.
function arrange(layer, side) {
  const wish = new Map(layer.map((place) => [place, middle(place, side)]));
  layer.sort((a, b) => wish.get(a) - wish.get(b));
  pack(layer, (place) => wish.get(place));
}

function settle(layer) {
  pack(layer, (place) => middle(place, 0));
}

function middle(place, side) {
  const near = place.near.filter((other) => side === 0 || Math.sign(other.rank - place.rank) === side);
  if (!near.length) return place.x;
  return near.reduce((sum, other) => sum + other.x, 0) / near.length;
}

// Put each place where it wishes to be, as far as the order and the gaps allow.
function pack(layer, wish) {
  const wishes = layer.map(wish);
  const groups = [];
  layer.forEach((place, i) => {
    groups.push({ places: [place], at: wishes[i], length: place.width });
    while (groups.length > 1) {
      const last = groups[groups.length - 1], previous = groups[groups.length - 2];
      if (previous.at + previous.length / 2 + SIDE_GAP <= last.at - last.length / 2) break;
      groups.splice(-2, 2, joined(previous, last));
    }
  });
  for (const group of groups) {
    let x = group.at - group.length / 2;
    for (const place of group.places) {
      place.x = x + place.width / 2;
      x += place.width + SIDE_GAP;
    }
  }
}

function joined(a, b) {
  const length = a.length + SIDE_GAP + b.length;
  const count = a.places.length + b.places.length;
  const wishA = a.at + (length - a.length) / 2, wishB = b.at - (length - b.length) / 2;
  return { places: [...a.places, ...b.places], at: (wishA * a.places.length + wishB * b.places.length) / count, length };
}
