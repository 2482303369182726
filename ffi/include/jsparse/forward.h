/* Block-sparse attention forward on Hopper GPUs (compute capability 9.0): the C interface.
 *
 * Every array is row-major, in the memory of the current CUDA device, and aligned to 16 bytes. The
 * launch allocates nothing and does not synchronise, so it can be captured into a CUDA graph.
 */
#ifndef JSPARSE_FORWARD_H_
#define JSPARSE_FORWARD_H_

#include "jsparse/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct jsparse_forward_args {
  jsparse_dtype dtype;
  int32_t batch, q_len, kv_len, num_heads, num_kv_heads;
  int32_t head_dim;          /* of q, k, v and out: a multiple of 8 up to 128 */
  int32_t block_q, block_kv; /* 64 or 128 */
  int32_t tile_q;            /* query rows of an item: 64, block_q, or 256: beside a bias, with head sizes up
                              * to 32, where no element is tested but for lengths */
  int32_t share;             /* with tile_q 64, whether the warpgroups of a multiprocessor compute
                              * each item together: for fewer items than multiprocessors */
  float scale;               /* of the logits, above 0 */

  const void *q;   /* [B, T, H, D] */
  const void *k;   /* [B, S, K, D] */
  const void *v;   /* [B, S, K, D] */
  void *out;       /* [B, T, H, D] */
  float *lse;      /* [B, H, T], natural logarithm; -inf where a query sees nothing */
  float *part_out; /* workspace [slots, tile_q, D] */
  float *part_lse; /* [slots, tile_q] */

  jsparse_schedule schedule; /* rows are of tile_q queries, columns of block_kv keys */
  jsparse_elements elements; /* bad: where v[b, s, k, :] is not finite */
  jsparse_bias bias; /* of dtype or float32, and not with share; rows fill whole 16 bytes */
} jsparse_forward_args;

/* Walkers of a schedule that share one multiprocessor, or 0 if there is no kernel for the sizes. Of a bias
 * the size is that of a value in bytes, 2 or 4; 0 for none. */
JSPARSE_API int32_t jsparse_forward_walkers(int32_t head_dim, int32_t tile_q, int32_t block_kv,
                                            int32_t share, int32_t bias_size);

/* Launches the forward pass on `stream` (a cudaStream_t).
 *
 * Returns 0, or another number after writing why to `message`.
 */
JSPARSE_API int jsparse_forward(const jsparse_forward_args *args, void *stream, char *message,
                                size_t message_size);

#ifdef __cplusplus
}
#endif

#endif /* JSPARSE_FORWARD_H_ */
