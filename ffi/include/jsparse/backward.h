/* Gradients of block-sparse attention on Hopper GPUs (compute capability 9.0): the C interface.
 *
 * Two launches: dq over the lists by query block, dk and dv over those by key block; or one for all,
 * over those by key block. They are deterministic. Every array is row-major, in the memory of the
 * current CUDA device, and aligned to 16 bytes. A launch allocates nothing and does not synchronise.
 */
#ifndef JSPARSE_BACKWARD_H_
#define JSPARSE_BACKWARD_H_

#include "jsparse/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What all launches read. R is the number of queries in whole blocks. */
typedef struct jsparse_backward_args {
  jsparse_dtype dtype;
  int32_t batch, q_len, kv_len, num_heads, num_kv_heads;
  int32_t head_dim;          /* a multiple of 8 up to 128 */
  int32_t block_q, block_kv; /* 64 or 128 */
  float scale;               /* of the logits, above 0 */

  const void *q;      /* [B, T, H, D] */
  const void *k;      /* [B, S, K, D] */
  const void *v;      /* [B, S, K, D] */
  const void *dout;   /* [B, T, H, D] */
  const float *lse2;  /* [B, H, R], base 2; +inf where a query saw nothing or does not exist */
  const float *delta; /* [B, H, R], sum(dout * out) - dlse; finite where lse2 is +inf */

  jsparse_schedule schedule;
  jsparse_elements elements;
  jsparse_bias bias; /* its block numbers are those of this launch's lists */
} jsparse_backward_args;

/* Of a launch that computes all gradients: where the steps of its items, rows of keys, add their parts of
 * dq. A step is an item's block, or, where a block of queries is more than a tile, each tile of it; the
 * steps of an item are numbered from its field for them on. The parts of a tile of queries are added to
 * one of the sums that it has, one after another; the order must be one in which all workers, each
 * with its items in their order, can go on. */
typedef struct jsparse_turns {
  const int32_t *turns; /* [steps, 2]: the sum, and how many parts are added to it before; NULL: no dq */
  const int32_t *sums_of; /* [B, H, tiles of R, 2]: the first sum of a tile, and how many it has */
  int32_t num_sums;
  float *sums;             /* [num_sums, tile, D as 32, 64 or 128]: workspace */
  int32_t *taken;          /* [num_sums]: workspace */
  /* [B, K, S in whole blocks]: not 0 where a key is not finite; NULL if no entry is JSPARSE_FLAGGED_ROW. */
  const int32_t *bad_keys;
} jsparse_turns;

/* Queries of a tile of jsparse_turns, or 0 if there is no kernel for all gradients. */
JSPARSE_API int32_t jsparse_backward_tile(int32_t head_dim, int32_t block_q, int32_t block_kv);

/* Walkers of a schedule that share one multiprocessor, or 0 if there is no kernel for the sizes: for
 * dq, rows are queries and columns keys, and keys is 0; for dk and dv the reverse, and keys is 1. */
JSPARSE_API int32_t jsparse_backward_walkers(int32_t keys, int32_t head_dim, int32_t block_rows,
                                             int32_t block_columns);

/* Launches dq [B, T, H, D] on `stream` (a cudaStream_t).
 *
 * Items are rows of block_q queries; `part` is their workspace [slots, block_q, D]. Bad columns are
 * keys that are not finite. `dbias` is NULL, or gets the gradient of a bias that nobody shares, like
 * bias.values, in the blocks that the lists have. Returns 0, or another number after writing why to
 * `message`.
 */
JSPARSE_API int jsparse_backward_dq(const jsparse_backward_args *args, void *dq, float *part,
                                    void *dbias, void *stream, char *message, size_t message_size);

/* Launches dk and dv [B, S, K, D].
 *
 * Items are rows of block_kv keys for one query head; those of the query heads that share a key head
 * follow one another, and then none is split. Bad columns are queries of which lse2 or delta is not
 * what a finite result gives. `by_key` is NULL, or gets [B, S, H], the sum over queries of the logits'
 * gradient: that of a bias by key; `part_by_key` is its workspace [slots, block_kv].
 */
JSPARSE_API int jsparse_backward_dkv(const jsparse_backward_args *args, void *dk, void *dv,
                                     float *part_dk, float *part_dv, float *by_key,
                                     float *part_by_key, void *stream, char *message,
                                     size_t message_size);

/* Launches dq, dk and dv: as jsparse_backward_dkv, and with no more workers than the GPU has
 * multiprocessors, all of which run at a time. A bias is of dtype, not by key, and for head sizes up to
 * 64; `dbias` is as in jsparse_backward_dq. */
JSPARSE_API int jsparse_backward(const jsparse_backward_args *args, const jsparse_turns *turns,
                                 void *dq, void *dk, void *dv, float *part_dk, float *part_dv,
                                 void *dbias, void *stream, char *message, size_t message_size);

#ifdef __cplusplus
}
#endif

#endif /* JSPARSE_BACKWARD_H_ */
