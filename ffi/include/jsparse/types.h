/* What the passes share: the schedule of a launch and the test of partial blocks.
 *
 * Rows and columns are those of the tiles that a kernel computes: queries and keys in the forward
 * pass and for dq, keys and queries for dk and dv.
 */
#ifndef JSPARSE_TYPES_H_
#define JSPARSE_TYPES_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define JSPARSE_API __attribute__((visibility("default")))

#define JSPARSE_MAX_RULES 4
#define JSPARSE_ITEM_FIELDS 12
/* Added to the entry of a partial block that has a bad column; see jsparse_elements. */
#define JSPARSE_FLAGGED (1 << 30)
/* Added to the entry of a partial block, of a launch that computes all gradients, that has a key which
 * is not finite. */
#define JSPARSE_FLAGGED_ROW (1 << 29)

/* float32 is the dtype of a bias only. */
typedef enum jsparse_dtype {
  JSPARSE_FLOAT16 = 0,
  JSPARSE_BFLOAT16 = 1,
  JSPARSE_FLOAT32 = 2
} jsparse_dtype;

/* What walkers compute, and in which order. An item is batch, query head, row (of tiles), first and
 * number of its partial list entries, first and number of its full ones, workspace slot or -1, bit
 * block of the first partial entry, column of the first block; and of a launch with jsparse_turns, the
 * first of the item's, and where in its lists it begins, in 1/65536 of either: they are walked round. */
typedef struct jsparse_schedule {
  const int32_t *partial;    /* flattened lists of partial blocks, by row */
  const int32_t *full;       /* flattened lists of full blocks, by row */
  int32_t num_workers;       /* a multiple of the walkers of a multiprocessor */
  int32_t items_per_worker;
  const int32_t *item_count; /* [num_workers] */
  const int32_t *items;      /* [num_workers, items_per_worker, JSPARSE_ITEM_FIELDS] */

  /* Rows whose items have workspace slots: parts go to the workspace and are merged. */
  int32_t num_split_rows;
  int32_t most_parts;
  const int32_t *split_rows;  /* [num_split_rows, 3]: batch, head, row; each once */
  const int32_t *split_slots; /* [num_split_rows, most_parts] slots, -1 where a row has fewer */
} jsparse_schedule;

/* R and C are the rows and columns of whole blocks. */
typedef enum jsparse_rule_kind {
  JSPARSE_SAME_LABEL = 0,      /* first: int32 [B or 1, R], second: [B or 1, C] */
  JSPARSE_ROW_INTERVAL = 1,    /* first <= column < second: int32 [B or 1, R] each */
  JSPARSE_COLUMN_INTERVAL = 2, /* first <= row < second: int32 [B or 1, C] each */
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

/* The test of partial blocks; a pointer that is NULL tests nothing. */
typedef struct jsparse_elements {
  const int32_t *lengths; /* [B, 2]: existing rows and columns */
  const int32_t *bits;    /* [B or 1, num_bits, block_rows, block_columns / 32] */
  int32_t num_bits;
  int32_t bits_batched;
  const int32_t *bad; /* [B, heads of the columns, C]: not 0 where a column is not finite */
  int32_t num_rules;
  jsparse_rule rules[JSPARSE_MAX_RULES];
} jsparse_elements;

/* Added to the scaled logits before the softmax, in natural units. -inf masks its element. */
typedef struct jsparse_bias {
  /* NULL for none; [entries, heads, rows, columns], or, of the listed blocks only,
   * [entries, heads, num_blocks, rows, columns]. */
  const void *values;
  jsparse_dtype dtype;
  int32_t entries; /* batch entry n has index n / inner % entries */
  int32_t inner;
  int32_t heads;      /* 1, for all query heads, or their number */
  int32_t num_blocks; /* 0 unless values are those of blocks */
  int32_t rows;       /* queries, or 1 for all of them; of a block: block_q */
  int32_t columns;    /* keys, or more: a row fills whole 16 bytes; of a block: block_kv */
  /* Which of num_blocks each entry of the schedule's lists is. */
  const int32_t *partial_numbers;
  const int32_t *full_numbers;
} jsparse_bias;

#ifdef __cplusplus
}
#endif

#endif /* JSPARSE_TYPES_H_ */
