/* libcublas of the stand-in: its errors' texts, which ours are sorted by. The rest is written by the build.
 * ABI: cuBLAS 13.0 (cublas_api.h). */

#include "stand_in.h"

enum { ALLOC_FAILED = 3 };

const char *cublasGetStatusName(int status) {
    return status == ALLOC_FAILED ? "CUBLAS_STATUS_ALLOC_FAILED" : status ? "CUBLAS_STATUS" : "CUBLAS_STATUS_SUCCESS";
}

const char *cublasGetStatusString(int status) {
    return status == ALLOC_FAILED ? "the resource allocation failed" : status ? "refused by the stand-in" : "success";
}
