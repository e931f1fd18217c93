// The keys a work item visits, as blocks for an engine.
#pragma once

#include <vector>

#include "attention/attention.h"

namespace longreach::attention {

struct Range {
    std::int32_t low, high;  // low .. high - 1
};

// Reads the key blocks of a plan; one stream per thread, whose memory is reused from item to item.
class KeyStream {
public:
    explicit KeyStream(const Args& args) : args_(args), row_(args.dim * type_bytes(args.kv_type)) {}
    static std::size_t bytes(const Args& args);
    void use(char* memory);  // of `bytes`, alignment 64
    void run(const Item& item, Engine& engine);

private:
    void list(const Item& item);  // the visited ranges of the item
    void count(const Item& item);
    void range(std::int32_t low, std::int32_t high);
    void gather(std::int32_t slot, std::int32_t position, int n);
    void close();  // pads the group being gathered
    void add(const Group& group, const std::int32_t* positions);
    void flush();

    const Args& args_;
    const std::size_t row_;  // bytes of a key
    Engine* engine_ = nullptr;
    std::vector<Range> ranges_;
    Block block_{};
    const char* keys_ = nullptr;  // of the item's KV head
    const char* values_ = nullptr;
    const float* key_scales_ = nullptr;
    const float* value_scales_ = nullptr;
    // gathered groups: those of the block, and one being filled
    char* gathered_ = nullptr;
    float* gathered_scales_ = nullptr;
    std::int32_t filled_positions_[kGroup];
    unsigned taken_ = 0;  // bit i: place i is part of the block
    int place_ = 0, filled_ = 0;
};

}  // namespace longreach::attention
