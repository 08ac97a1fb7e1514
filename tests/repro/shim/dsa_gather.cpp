// Runs cp_gather_indexer_k_quant_cache_kernel, cut out of a vLLM tree (kernel.inc), on cases read from a file:
//
//     dsa_gather cuda|rocm INPUT OUTPUT
//
// Each case is eight int32 (batch, rows, head_dim, quant_block, block_size, table_width, blocks, poison), then
// the cache (bytes), the block table and cu_seq_lens (int32). Written for each case: dst_k, then dst_scale.
// Every array has a heap block of exactly its size, so that AddressSanitizer sees the first byte past it.
#include "cuda_on_threads.h"

#include "cuda_utils.h"  // the tree's own: ceil_div

#define __syncthreads() shim::sync_block()
#define __syncwarp(...) shim::sync_warp()
namespace cuda {
#include "kernel.inc"
}
#define USE_ROCM 1
namespace rocm {
#include "kernel.inc"
}

namespace {

struct Case {
  int32_t batch, rows, head_dim, quant_block, block_size, table_width, blocks, poison;
  int cache_token_stride() const { return head_dim + head_dim / quant_block * 4; }
  size_t scales() const { return size_t(rows) * (head_dim / quant_block) * 4; }
};
struct Arrays {
  Case shape;
  char *cache, *dst_k, *dst_scale;
  int *table, *cu_seq_lens;
};

template <typename T>
T* read_array(size_t count, FILE* from) {
  T* data = static_cast<T*>(std::malloc(count * sizeof(T)));
  if (std::fread(data, sizeof(T), count, from) != count) shim::fail(shim::kBadInput, "the input is too short");
  return data;
}

char* untouched(size_t bytes) {
  void* data = std::malloc(bytes);
  return static_cast<char*>(std::memset(data, 0xAA, bytes));
}

// The arguments and the launch are those of CALL_CP_GATHER_INDEXER_K_QUANT_CACHE in the same file.
template <int BLOCK_Y_SIZE, bool ROCM>
void call(void* argument) {
  const Arrays& a = *static_cast<Arrays*>(argument);
  const Case& s = a.shape;
  const int64_t token = s.cache_token_stride();
  (ROCM ? rocm::cp_gather_indexer_k_quant_cache_kernel<BLOCK_Y_SIZE>
        : cuda::cp_gather_indexer_k_quant_cache_kernel<BLOCK_Y_SIZE>)(
      a.cache, a.dst_k, a.dst_scale, a.table, a.cu_seq_lens, s.batch, s.head_dim, s.head_dim, token * s.block_size,
      token, s.block_size, s.table_width, s.rows, s.quant_block);
}

template <int BLOCK_Y_SIZE>
void launch(Arrays& a, bool rocm) {
  const unsigned rows = a.shape.rows, width = 8 * 16;
  shim::Launch launch{{(rows + BLOCK_Y_SIZE - 1) / BLOCK_Y_SIZE, (a.shape.head_dim + width - 1) / width},
                      {8, BLOCK_Y_SIZE},
                      rocm ? 64u : 32u,
                      a.shape.poison,
                      rocm ? call<BLOCK_Y_SIZE, true> : call<BLOCK_Y_SIZE, false>,
                      &a};
  shim::run(launch, BLOCK_Y_SIZE * sizeof(int));
}

void dispatch(Arrays& a, bool rocm) {
  const int rows = a.shape.rows;
  if (rows < 32) {
    launch<1>(a, rocm);
  } else if (rows < 64) {
    launch<2>(a, rocm);
  } else if (rows < 128) {
    launch<4>(a, rocm);
  } else if (rows < 256) {
    launch<8>(a, rocm);
  } else if (rows < 512) {
    launch<16>(a, rocm);
  } else {
    launch<32>(a, rocm);
  }
}

}  // namespace

int main(int count, char** values) {
  if (count != 4) shim::fail(shim::kBadInput, "usage: dsa_gather cuda|rocm INPUT OUTPUT");
  const bool rocm = !std::strcmp(values[1], "rocm");
  FILE* input = std::fopen(values[2], "rb");
  FILE* output = std::fopen(values[3], "wb");
  if (!input || !output) shim::fail(shim::kBadInput, "cannot open the files");
  Case shape;
  while (std::fread(&shape, sizeof shape, 1, input) == 1) {
    Arrays a{shape};
    const size_t block_bytes = size_t(shape.block_size) * shape.cache_token_stride();
    a.cache = read_array<char>(shape.blocks * block_bytes, input);
    a.table = read_array<int>(size_t(shape.batch) * shape.table_width, input);
    a.cu_seq_lens = read_array<int>(shape.batch + 1, input);
    a.dst_k = untouched(size_t(shape.rows) * shape.head_dim);
    a.dst_scale = untouched(shape.scales());
    dispatch(a, rocm);
    std::fwrite(a.dst_k, 1, size_t(shape.rows) * shape.head_dim, output);
    std::fwrite(a.dst_scale, 1, shape.scales(), output);
    std::free(a.cache), std::free(a.table), std::free(a.cu_seq_lens), std::free(a.dst_k), std::free(a.dst_scale);
  }
  return std::fclose(output) ? shim::kBadInput : 0;
}
