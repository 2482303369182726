/* Block-sparse attention forward on Hopper GPUs (compute capability 9.0): the C interface.
 *
 * Every array is row-major, in the memory of the current CUDA device, and aligned to 16 bytes. The
 * launch allocates nothing and does not synchronise, so it can be captured into a CUDA graph.
 */
#ifndef JSPARSE_FORWARD_H_
#define JSPARSE_FORWARD_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define JSPARSE_API __attribute__((visibility("default")))

#define JSPARSE_MAX_RULES 4
#define JSPARSE_ITEM_FIELDS 12
/* Added to the entry of a partial block in which some v[b, s, k, :] is not finite. */
#define JSPARSE_FLAGGED (1 << 30)

typedef enum jsparse_dtype { JSPARSE_FLOAT16 = 0, JSPARSE_BFLOAT16 = 1 } jsparse_dtype;

typedef enum jsparse_rule_kind {
  JSPARSE_SAME_LABEL = 0,      /* first: int32 [B or 1, nq * block_q], second: [B or 1, nkv * block_kv] */
  JSPARSE_ROW_INTERVAL = 1,    /* first <= key < second: int32 [B or 1, nq * block_q] each */
  JSPARSE_COLUMN_INTERVAL = 2, /* first <= query < second: int32 [B or 1, nkv * block_kv] each */
  JSPARSE_WITHIN = 3           /* squared distance of float32 [B or 1, 3, ...] <= third [B or 1] */
} jsparse_rule_kind;

/* A test that every element of a partial block must pass. NaN coordinates are close to nothing. */
typedef struct jsparse_rule {
  jsparse_rule_kind kind;
  const void *first;
  const void *second;
  const float *third;
  /* Whether the array has an entry for each of the B batch entries, and not one for all. */
  int32_t first_batched;
  int32_t second_batched;
  int32_t third_batched;
} jsparse_rule;

typedef struct jsparse_forward_args {
  jsparse_dtype dtype;
  int32_t batch, q_len, kv_len, num_heads, num_kv_heads;
  int32_t head_dim;          /* of q, k, v and out: 32, 64 or 128 */
  int32_t block_q, block_kv; /* 64 or 128 */
  int32_t tile_q;            /* query rows of an item: 64 or block_q */
  int32_t share;             /* with tile_q 64, whether the warpgroups of a multiprocessor compute
                              * each item together: for fewer items than multiprocessors */
  float scale;               /* of the logits, above 0 */

  const void *q;       /* [B, T, H, D] */
  const void *k;       /* [B, S, K, D] */
  const void *v;       /* [B, S, K, D] */
  void *out;           /* [B, T, H, D] */
  float *lse;          /* [B, H, T], natural logarithm; -inf where a query sees nothing */

  const int32_t *kv_indices;      /* flattened lists of partial blocks */
  const int32_t *full_kv_indices; /* flattened lists of full blocks */

  /* The schedule. An item is batch, head, row (of tiles of tile_q), first and number of its partial
   * list entries, first and number of its full ones, workspace slot or -1, bit block of the first
   * partial entry, column of the first block, and two that are unused. */
  int32_t num_workers;       /* a multiple of jsparse_forward_walkers */
  int32_t items_per_worker;
  const int32_t *item_count; /* [num_workers] */
  const int32_t *items;      /* [num_workers, items_per_worker, JSPARSE_ITEM_FIELDS] */

  /* Rows whose items have workspace slots: parts go to the workspace and are merged. */
  int32_t num_split_rows;
  int32_t most_parts;
  const int32_t *split_rows;  /* [num_split_rows, 3]: batch, head, row; each once */
  const int32_t *split_slots; /* [num_split_rows, most_parts] slots, -1 where a row has fewer */
  float *part_out;            /* [slots, tile_q, D] */
  float *part_lse;            /* [slots, tile_q] */

  /* The test of partial blocks; a pointer that is NULL tests nothing. */
  const int32_t *lengths; /* [B, 2]: existing queries and keys */
  const int32_t *bits;    /* [B or 1, num_bits, block_q, (block_kv + 31) / 32] */
  int32_t num_bits;
  int32_t bits_batched;
  const int32_t *bad_keys; /* [B, K, nkv * block_kv]: not 0 where v[b, s, k, :] is not finite */
  int32_t num_rules;
  jsparse_rule rules[JSPARSE_MAX_RULES];
} jsparse_forward_args;

/* Walkers of a schedule that share one multiprocessor, or 0 if there is no kernel for the sizes. */
JSPARSE_API int32_t jsparse_forward_walkers(int32_t head_dim, int32_t tile_q, int32_t block_kv,
                                            int32_t share);

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
