/* libcublasLt of the stand-in: what takes its stream as an argument. The rest is written by the build.
 * ABI: cuBLAS 13.0, x86-64 (cublasLt.h). */

#include "stand_in.h"

int cublasLtMatmul(void *handle, void *operation, void *alpha, void *a, void *a_layout, void *b, void *b_layout,
                   void *beta, void *c, void *c_layout, void *d, void *d_layout, void *algorithm, void *workspace,
                   size_t bytes, void *stream) {
    ENTER;
    (void)handle, (void)operation, (void)alpha, (void)a, (void)a_layout, (void)b, (void)b_layout, (void)beta;
    (void)c, (void)c_layout, (void)d, (void)d_layout, (void)algorithm, (void)workspace, (void)bytes;
    return stand_in_library_kernel("cublasLtMatmul", stream);
}

int cublasLtMatrixTransform(void *handle, void *operation, void *alpha, void *a, void *a_layout, void *beta, void *b,
                            void *b_layout, void *c, void *c_layout, void *stream) {
    ENTER;
    (void)handle, (void)operation, (void)alpha, (void)a, (void)a_layout, (void)beta, (void)b, (void)b_layout;
    (void)c, (void)c_layout;
    return stand_in_library_kernel("cublasLtMatrixTransform", stream);
}
