// A pattern as stof_hf/masks/closed_form.py writes it down, and which words each tile of it holds.
#pragma once

#include <memory>

#include "random.h"

namespace stof {

// Each operation is followed by its numbers; patterns that it combines stand in front of it.
enum Operation : int64_t {
  kFullOp = 0,
  kBandOp,       // low, high
  kDilatedOp,    // reach, step
  kChunksOp,     // size
  kKeysOp,       // count, then the begin and the end of each range
  kQueriesOp,    // likewise
  kDocumentsOp,  // address of ids, batch, positions
  kRandomOp,     // blocks, size, seed, fill, blocks to draw from
  kAndOp,        // number of patterns
  kOrOp,         // likewise
  kNotOp,
};

// The words of tiles by number; 0 is the empty tile, 1 the full one.
class Program {
 public:
  Program(const Keys& keys, const int64_t* code, int64_t length) {
    uint64_t words[kTile];
    for (uint64_t all : {uint64_t{0}, kAll}) {
      std::fill(words, words + kTile, all);
      tiles_.add(words);
    }
    std::vector<int32_t> stack;
    for (const int64_t* end = code + length; code < end;) {
      Node node((Operation)*code++);
      switch (node.operation) {
        case kFullOp:
          break;
        case kBandOp:
          node.leaf = std::make_unique<Band>(keys, code[0], code[1]);
          code += 2;
          break;
        case kDilatedOp:
          node.leaf = std::make_unique<Dilated>(keys, code[0], code[1]);
          code += 2;
          break;
        case kChunksOp:
          node.leaf = std::make_unique<Chunks>(keys, code[0]);
          code += 1;
          break;
        case kKeysOp:
          node.leaf = std::make_unique<KeyRanges>(keys, Ranges{code + 1, code[0]});
          code += 1 + 2 * code[0];
          break;
        case kQueriesOp:
          node.leaf = std::make_unique<QueryRanges>(keys, Ranges{code + 1, code[0]});
          code += 1 + 2 * code[0];
          break;
        case kDocumentsOp:
          node.leaf = std::make_unique<Documents>(keys, reinterpret_cast<const int64_t*>(code[0]),
                                                  code[1], code[2]);
          code += 3;
          break;
        case kRandomOp:
          node.leaf = std::make_unique<RandomBlocks>(keys, code[0], code[1], (uint64_t)code[2],
                                                     (uint64_t)code[3], code[4]);
          code += 5;
          break;
        case kAndOp:
        case kOrOp:
          node.of.assign(stack.end() - code[0], stack.end());
          code += 1;
          break;
        case kNotOp:
          node.of.assign(1, stack.back());
          break;
      }
      stack.resize(stack.size() - node.of.size());
      stack.push_back((int32_t)nodes_.size());
      nodes_.push_back(std::move(node));
    }
    states_.assign(nodes_.size(), kEverything);
    for (Node& node : nodes_) {
      node.state = &states_[&node - nodes_.data()];
      if (node.leaf) {
        leaves_.push_back(&node);
        node.known.resize(1 << kKnownBits);
      }
      if (!node.of.empty()) combining_.push_back(&node);
    }
  }

  // Begins a tile row of `tiles` tiles.
  void open(const TileRow& row, int32_t tiles) {
    begin(row, tiles, [&](Leaf& leaf) { leaf.open(row); });
  }

  // Begins a tile row of which one tile alone is asked for.
  void open_at(const TileRow& row, int32_t tile, int32_t tiles) {
    begin(row, tiles, [&](Leaf& leaf) { leaf.open_at(row, tile); });
  }

  // About what a tile row of so many tiles takes, in ns.
  double cost(int64_t tiles) const {
    double cost = 0;
    for (const Node* node : leaves_) cost += node->leaf->cost();
    // Where rows follow, those are copied that the first or the last tile cuts, and others cost
    // little.
    return follows() ? 30 + 0.3 * cost * std::min(1.0, cost / (10 * (double)tiles)) : cost;
  }

  // Calls emit(begin, end, id) for stretches of equal tiles, from `begin` to `last`, that are not known to
  // be empty. Within a row, `begin` must not fall.
  template <typename Emit>
  void run(int32_t begin, int32_t last, Emit emit) {
    while (begin < last) {
      int32_t end = last;
      for (Node* node : changing_) {
        while (node->at->end <= begin) ++node->at;
        *node->state = node->at->state;
        end = std::min(end, node->at->end);
      }
      settle();
      if (states_.back() == kEverything)
        emit(begin, end, kFullId);
      else if (states_.back() == kSome)
        emit(begin, end, id(nodes_.back(), begin));
      begin = end;
    }
  }

  // Whether a tile row holds what the one before holds, one tile further on: whether only distances count.
  bool follows() const {
    return std::all_of(nodes_.begin(), nodes_.end(), [](const Node& node) {
      return !node.leaf || node.operation == kBandOp || node.operation == kDilatedOp;
    });
  }

  static constexpr int32_t kEmptyId = 0, kFullId = 1;
  const uint64_t* words(int32_t id) const { return tiles_[id]; }
  int32_t size() const { return tiles_.size(); }

 private:
  struct Known {
    int64_t key = kNoKey;
    int32_t id = -1;
  };
  static constexpr int kKnownBits = 10;

  struct Node {
    explicit Node(Operation operation) : operation(operation) {}

    Operation operation;
    std::unique_ptr<Leaf> leaf;
    std::vector<int32_t> of;
    State* state = nullptr;
    Segment* at = nullptr;
    std::vector<Known> known;  // of a leaf, the last of each hash
  };

  template <typename Open>
  void begin(const TileRow& row, int32_t tiles, Open open) {
    row_ = row;
    changing_.clear();
    for (Node* node : leaves_) {
      open(*node->leaf);
      node->at = node->leaf->segments.data();
      *node->state = node->at->state;
      if (node->at->end < tiles) changing_.push_back(node);
    }
  }

  // What each node leaves empty or fills whatever the words of tiles that leaves cut.
  void settle() {
    constexpr State n = kNothing, s = kSome, e = kEverything;
    // By the states that the combined patterns have between them.
    static constexpr State kAnd[8] = {e, n, s, n, e, n, s, n}, kOr[8] = {n, n, s, s, e, e, e, e},
                           kNot[8] = {s, e, s, s, n, s, s, s};
    for (const Node* node : combining_) {
      int states = 0;
      for (int32_t i : node->of) states |= states_[i];
      *node->state = (node->operation == kAndOp  ? kAnd
                      : node->operation == kOrOp ? kOr
                                                 : kNot)[states];
    }
  }

  int32_t id(Node& node, int32_t tile) {
    if (*node.state != kSome) return *node.state == kEverything ? kFullId : kEmptyId;
    if (node.leaf) return id_of_leaf(node, tile);
    int32_t out = id(nodes_[node.of[0]], tile);
    if (node.operation == kNotOp) return combine(kNotOp, out, 0);
    const int32_t settled = node.operation == kAndOp ? kEmptyId : kFullId;
    for (size_t i = 1; i < node.of.size() && out != settled; ++i)
      out = combine(node.operation, out, id(nodes_[node.of[i]], tile));
    return out;
  }

  int32_t id_of_leaf(Node& node, int32_t tile) {
    Segment& segment = *node.at;
    if (segment.id >= 0) return segment.id;
    if (segment.key == kNoKey) return segment.id = evaluate(*node.leaf, tile);
    const uint64_t hash = (uint64_t)segment.key * 0x9e3779b97f4a7c15ull;
    Known& known = node.known[hash >> (64 - kKnownBits)];
    if (known.key != segment.key) known = {segment.key, evaluate(*node.leaf, tile)};
    return segment.id = known.id;
  }

  int32_t evaluate(Leaf& leaf, int32_t tile) {
    uint64_t words[kTile];
    leaf.words(row_, tile, words);
    return tiles_.add(words);
  }

  int32_t combine(Operation operation, int32_t a, int32_t b) {
    if (operation != kNotOp) {
      const int32_t settled = operation == kAndOp ? kEmptyId : kFullId;
      if (a == settled || b == settled) return settled;
      if (a == b || b == 1 - settled) return a;
      if (a == 1 - settled) return b;
    }
    const Combined next = {operation, a, b, -1};
    const int32_t found = combined_by_.find(
        fold((uint64_t)operation << 32 ^ (uint32_t)a, (uint32_t)b), (int32_t)combined_.size(),
        [&](int32_t i) {
          return combined_[i].operation == operation && combined_[i].a == a && combined_[i].b == b;
        });
    if (found >= 0) return combined_[found].id;
    uint64_t words[kTile];
    const uint64_t *x = tiles_[a], *y = tiles_[b];
    for (int r = 0; r < kTile; ++r)
      words[r] = operation == kAndOp ? x[r] & y[r] : operation == kOrOp ? x[r] | y[r] : ~x[r];
    combined_.push_back(next);
    return combined_.back().id = tiles_.add(words);
  }

  struct Combined {
    Operation operation;
    int32_t a, b, id;
  };

  TileRow row_ = {};  // at hand
  std::vector<Node> nodes_;
  std::vector<State> states_;  // of the tiles at hand, by node
  std::vector<Node*> leaves_, combining_;
  std::vector<Node*> changing_;  // leaves that do not see the same in all of a tile row
  TileSet tiles_;
  std::vector<Combined> combined_;
  Slots combined_by_;
};

}  // namespace stof
