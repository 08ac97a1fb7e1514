// The names that torch's headers use of NVIDIA's mathematical libraries, whose own headers come in hundreds of MB only.
// Types alone: nothing that the tests compile calls them.
#pragma once
typedef struct cublasContext* cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS = 0 } cublasStatus_t;
