/* What a test asks of fake_cublaslt.c, and what it has seen. */
#ifndef QS_TESTS_FAKE_CUBLASLT_H
#define QS_TESTS_FAKE_CUBLASLT_H

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    void *workspace; /* the one that every product must bring */
    size_t workspace_bytes;
    bool none;          /* propose nothing */
    bool only_in_place; /* propose only what adds in place */
    bool fails;         /* the product itself */
    int handles, questions, products;
} fake_lt_state;

extern fake_lt_state fake_lt;

#endif
