/* What a ConvNet's layers do to memory, for one floating-point type REAL (float or double).
 *
 * Products of matrices are left to BLAS; here is what lies between them. Every array is
 * contiguous with the channels last, so that each inner loop runs over channels, and every
 * function works on one chunk of images in the calling thread.
 *
 * Symbols: n images, h x w pixels, C channels; S = h w / 4 pooling windows of 2 x 2 pixels.
 * "Windows" is the layout (n, S, 4, C): pixels grouped by the window that pooling will average.
 * A tile has m x m output pixels (m = 2 or 4) and a = m + 2 input pixels a side; "planes" is the
 * layout (a a, T, C) of n h w / m^2 = T tiles in Winograd's domain, with a stride between planes.
 *
 * A quantity with _d behind its name is a tangent: the derivative along one direction in
 * parameter space. The functions whose name ends in _dual carry values and tangents together.
 */

#include <math.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif
typedef REAL real;
typedef long long size;

#define INLINE static inline __attribute__((always_inline))
#define LANES (64 / (int)sizeof(real)) /* channels of one vector register, at most */
#define EPS ((real)1e-5)               /* torch.nn.GroupNorm's default */
#define ROWS 64                        /* rows that one partial sum takes */

/* --- Winograd's minimal filtering (Lavin & Gray, CVPR 2016): F(2x2, 3x3) and F(4x4, 3x3) --- */

static const real IN2[4 * 4] = {1, 0, -1, 0, 0, 1, 1, 0, 0, -1, 1, 0, 0, 1, 0, -1};
static const real OUT2[2 * 4] = {1, 1, 1, 0, 0, 1, -1, -1};
static const real IN4[6 * 6] = {4, 0,  -5, 0, 1, 0, 0, -4, -4, 1,  1, 0, 0, 4, -4, -1, 1, 0,
                                0, -2, -1, 2, 1, 0, 0, 2,  -1, -2, 1, 0, 0, 4, 0,  -5, 0, 1};
static const real OUT4[4 * 6] = {1, 1, 1, 1, 1, 0, 0, 1, -1, 2, -2, 0,
                                 0, 1, 1, 4, 4, 0, 0, 1, -1, 8, -8, 1};

/* out[i] = sum_j M[i, j] in[j] over vectors of `lanes` channels; M (rows, cols), or its
 * transpose. All but the pointers are constants where it is inlined: zeros cost nothing. */
INLINE void combine(const real *M, int rows, int cols, int transposed, const real *in, int in_step,
                    real *out, int out_step, int lanes) {
    const int outs = transposed ? cols : rows, ins = transposed ? rows : cols;
#pragma GCC unroll 6
    for (int i = 0; i < outs; i++) {
        for (int l = 0; l < lanes; l++) {
            real sum = 0;
#pragma GCC unroll 6
            for (int j = 0; j < ins; j++) {
                const real k = transposed ? M[j * cols + i] : M[i * cols + j];
                if (k != 0) sum += k * in[j * in_step * LANES + l];
            }
            out[i * out_step * LANES + l] = sum;
        }
    }
}

/* out = M in M^T for a square of vectors; in (ins, ins, LANES), out (outs, outs, LANES). */
INLINE void both_sides(const real *M, int rows, int cols, int transposed, const real *in, real *out,
                       int lanes) {
    const int outs = transposed ? cols : rows, ins = transposed ? rows : cols;
    real half[6 * 6 * LANES];
#pragma GCC unroll 1
    for (int j = 0; j < ins; j++)
        combine(M, rows, cols, transposed, in + j * LANES, ins, half + j * LANES, ins, lanes);
#pragma GCC unroll 1
    for (int i = 0; i < outs; i++)
        combine(M, rows, cols, transposed, half + i * ins * LANES, 1, out + i * outs * LANES, 1,
                lanes);
}

enum step { IMAGE_TO_PLANES, PLANES_TO_IMAGE, PLANES_TO_WINDOWS, WINDOWS_TO_PLANES };

/* One tile, channels c .. c + lanes, through one of the four maps. */
INLINE void one_tile(enum step step, int m, real *spatial, real *planes, size stride, size h, size w,
                     size C, size row, size col, int lanes) {
    const int a = m + 2;
    const real *IN = m == 4 ? IN4 : IN2, *OUT = m == 4 ? OUT4 : OUT2;
    real space[6 * 6 * LANES], winograd[6 * 6 * LANES];
    if (step == IMAGE_TO_PLANES || step == PLANES_TO_IMAGE) {
        const size top = row * m - 1, left = col * m - 1;
        if (step == PLANES_TO_IMAGE) {
            for (int k = 0; k < a * a; k++)
                for (int l = 0; l < lanes; l++) winograd[k * LANES + l] = planes[k * stride + l];
            both_sides(IN, a, a, 1, winograd, space, lanes);
        }
        for (int i = 0; i < a; i++)
            for (int j = 0; j < a; j++) {
                const size y = top + i, x = left + j;
                const int inside = y >= 0 && y < h && x >= 0 && x < w;
                real *pixel = spatial + (y * w + x) * C, *here = space + (i * a + j) * LANES;
                if (step == PLANES_TO_IMAGE) {
                    if (inside)
                        for (int l = 0; l < lanes; l++) pixel[l] += here[l];
                } else {
                    for (int l = 0; l < lanes; l++) here[l] = inside ? pixel[l] : 0;
                }
            }
        if (step == IMAGE_TO_PLANES) {
            both_sides(IN, a, a, 0, space, winograd, lanes);
            for (int k = 0; k < a * a; k++)
                for (int l = 0; l < lanes; l++) planes[k * stride + l] = winograd[k * LANES + l];
        }
    } else {
        if (step == PLANES_TO_WINDOWS) {
            for (int k = 0; k < a * a; k++)
                for (int l = 0; l < lanes; l++) winograd[k * LANES + l] = planes[k * stride + l];
            both_sides(OUT, m, a, 0, winograd, space, lanes);
        }
        for (int i = 0; i < m; i++)
            for (int j = 0; j < m; j++) {
                const size window = (row * (m / 2) + i / 2) * (w / 2) + col * (m / 2) + j / 2;
                real *pixel = spatial + (window * 4 + i % 2 * 2 + j % 2) * C;
                real *here = space + (i * m + j) * LANES;
                if (step == PLANES_TO_WINDOWS)
                    for (int l = 0; l < lanes; l++) pixel[l] = here[l];
                else
                    for (int l = 0; l < lanes; l++) here[l] = pixel[l];
            }
        if (step == WINDOWS_TO_PLANES) {
            both_sides(OUT, m, a, 1, space, winograd, lanes);
            for (int k = 0; k < a * a; k++)
                for (int l = 0; l < lanes; l++) planes[k * stride + l] = winograd[k * LANES + l];
        }
    }
}

INLINE void all_tiles(enum step step, int m, real *spatial, real *planes, size stride, size n, size h,
                      size w, size C) {
    for (size image = 0; image < n; image++)
        for (size row = 0; row < h / m; row++)
            for (size col = 0; col < w / m; col++) {
                real *space = spatial + image * h * w * C;
                real *tile = planes + ((image * (h / m) + row) * (w / m) + col) * C;
                size c = 0;
                for (; c + LANES <= C; c += LANES)
                    one_tile(step, m, space + c, tile + c, stride, h, w, C, row, col, LANES);
                if (c < C)
                    one_tile(step, m, space + c, tile + c, stride, h, w, C, row, col, (int)(C - c));
            }
}

#define TILES(name, step)                                                                        \
    void name(real *spatial, real *planes, size stride, size n, size h, size w, size C, size m) { \
        if (m == 4)                                                                              \
            all_tiles(step, 4, spatial, planes, stride, n, h, w, C);                             \
        else                                                                                     \
            all_tiles(step, 2, spatial, planes, stride, n, h, w, C);                             \
    }

/* images (n, h, w, C), zeros around them -> planes */
TILES(image_to_planes, IMAGE_TO_PLANES)
/* its adjoint, added to images */
TILES(planes_to_image, PLANES_TO_IMAGE)
/* planes -> the convolution's output, as windows */
TILES(planes_to_windows, PLANES_TO_WINDOWS)
/* its adjoint */
TILES(windows_to_planes, WINDOWS_TO_PLANES)

/* --- the first convolution, whose few channels make a product of matrices cheaper --- */

/* images (n, h, w, C) <-> patches (n, S, 4, 9 C), zeros around the images; backwards it adds. */
INLINE void patches(real *images, real *rows, size n, size h, size w, size C, int back) {
    for (size image = 0; image < n; image++)
        for (size window = 0; window < h * w / 4; window++)
            for (int pixel = 0; pixel < 4; pixel++) {
                const size y = window / (w / 2) * 2 + pixel / 2, x = window % (w / 2) * 2 + pixel % 2;
                for (int i = -1; i <= 1; i++)
                    for (int j = -1; j <= 1; j++, rows += C) {
                        const int inside = y + i >= 0 && y + i < h && x + j >= 0 && x + j < w;
                        real *here = images + ((image * h + y + i) * w + x + j) * C;
                        for (size c = 0; c < C; c++) {
                            if (!back)
                                rows[c] = inside ? here[c] : 0;
                            else if (inside)
                                here[c] += rows[c];
                        }
                    }
            }
}

void image_to_patches(real *images, real *rows, size n, size h, size w, size C) {
    patches(images, rows, n, h, w, C, 0);
}

void patches_to_image(real *images, real *rows, size n, size h, size w, size C) {
    patches(images, rows, n, h, w, C, 1);
}

/* --- instance norm with scale and shift -> ReLU -> average over windows --- */

/* total[c] += sum over rows of TERM(i), in partial sums; i = row C + c. */
#define SUM(total, rows, C, term)                                              \
    for (size first_ = 0; first_ < (rows); first_ += ROWS) {                   \
        const size last_ = first_ + ROWS < (rows) ? first_ + ROWS : (rows);    \
        real part_[C];                                                         \
        memset(part_, 0, sizeof part_);                                        \
        for (size row = first_; row < last_; row++)                            \
            for (size c = 0; c < (C); c++) {                                   \
                const size i = row * (C) + c;                                  \
                part_[c] += (term);                                            \
            }                                                                  \
        for (size c = 0; c < (C); c++) (total)[c] += part_[c];                 \
    }

/* y (n, S, 4, C) in, its normalised self out; r = 1 / sqrt(var + eps) (n, C); x (n, S, C). */
void block(real *restrict y, const real *restrict gamma, const real *restrict beta,
           real *restrict x, real *restrict r, size n, size S, size C) {
    const real one = (real)1 / (4 * S);
    for (size image = 0; image < n; image++, y += S * 4 * C, x += S * C, r += C) {
        real mean[C], var[C];
        memset(mean, 0, sizeof mean);
        memset(var, 0, sizeof var);
        SUM(mean, 4 * S, C, y[i])
        for (size c = 0; c < C; c++) mean[c] *= one;
        SUM(var, 4 * S, C, (y[i] - mean[c]) * (y[i] - mean[c]))
        for (size c = 0; c < C; c++) r[c] = 1 / (real)sqrt(var[c] * one + EPS);
        memset(x, 0, S * C * sizeof *x);
        for (size row = 0; row < 4 * S; row++)
            for (size c = 0; c < C; c++) {
                const size i = row * C + c;
                const real hat = (y[i] - mean[c]) * r[c], z = gamma[c] * hat + beta[c];
                y[i] = hat;
                x[row / 4 * C + c] += z > 0 ? z * (real)0.25 : 0;
            }
    }
}

/* The same with tangents; q = mean(hat r (y_d - mean y_d)) (n, C), which backward needs. */
void block_dual(real *restrict y, real *restrict y_d, const real *restrict gamma,
                const real *restrict beta, const real *restrict gamma_d,
                const real *restrict beta_d, real *restrict x, real *restrict x_d,
                real *restrict r, real *restrict q, size n, size S, size C) {
    const real one = (real)1 / (4 * S);
    for (size image = 0; image < n; image++) {
        real mean[C], var[C], mean_d[C];
        memset(mean, 0, sizeof mean);
        memset(var, 0, sizeof var);
        memset(mean_d, 0, sizeof mean_d);
        memset(q, 0, sizeof mean);
        SUM(mean, 4 * S, C, y[i])
        SUM(mean_d, 4 * S, C, y_d[i])
        for (size c = 0; c < C; c++) mean[c] *= one, mean_d[c] *= one;
        SUM(var, 4 * S, C, (y[i] - mean[c]) * (y[i] - mean[c]))
        SUM(q, 4 * S, C, (y[i] - mean[c]) * (y_d[i] - mean_d[c]))
        for (size c = 0; c < C; c++) {
            r[c] = 1 / (real)sqrt(var[c] * one + EPS);
            q[c] *= r[c] * r[c] * one;
        }
        memset(x, 0, S * C * sizeof *x);
        memset(x_d, 0, S * C * sizeof *x_d);
        for (size row = 0; row < 4 * S; row++)
            for (size c = 0; c < C; c++) {
                const size i = row * C + c, o = row / 4 * C + c;
                const real hat = (y[i] - mean[c]) * r[c];
                const real hat_d = (y_d[i] - mean_d[c]) * r[c] - hat * q[c];
                const real z = gamma[c] * hat + beta[c];
                const real z_d = gamma_d[c] * hat + gamma[c] * hat_d + beta_d[c];
                y[i] = hat;
                y_d[i] = hat_d;
                const real open = z > 0 ? (real)0.25 : 0;
                x[o] += open * z;
                x_d[o] += open * z_d;
            }
        y += S * 4 * C, y_d += S * 4 * C, x += S * C, x_d += S * C, r += C, q += C;
    }
}

/* dL/dx (n, S, C) -> dL/dy (n, S, 4, C); dL/dgamma and dL/dbeta (C) are added to. */
void block_back(const real *restrict hat, const real *restrict gamma, const real *restrict beta,
                const real *restrict r, const real *restrict gx, real *restrict gy,
                real *restrict ggamma, real *restrict gbeta, size n, size S, size C) {
    const real one = (real)1 / (4 * S);
    for (size image = 0; image < n; image++) {
        real flat[C], along[C];
        memset(flat, 0, sizeof flat);
        memset(along, 0, sizeof along);
        for (size s = 0; s < S; s++)
            for (size k = 0; k < 4; k++)
                for (size c = 0; c < C; c++) {
                    const size i = (s * 4 + k) * C + c;
                    const real z = gamma[c] * hat[i] + beta[c];
                    gy[i] = z > 0 ? gx[s * C + c] * (real)0.25 : 0;
                }
        SUM(flat, 4 * S, C, gy[i])
        SUM(along, 4 * S, C, gy[i] * hat[i])
        for (size c = 0; c < C; c++) {
            gbeta[c] += flat[c];
            ggamma[c] += along[c];
            flat[c] *= one;
            along[c] *= one;
        }
        for (size row = 0; row < 4 * S; row++)
            for (size c = 0; c < C; c++) {
                const size i = row * C + c;
                gy[i] = r[c] * gamma[c] * (gy[i] - flat[c] - hat[i] * along[c]);
            }
        hat += S * 4 * C, gy += S * 4 * C, gx += S * C, r += C;
    }
}

/* The same with tangents; only the tangents of gamma's and beta's gradients are wanted. */
void block_back_dual(const real *restrict hat, const real *restrict hat_d,
                     const real *restrict gamma, const real *restrict beta,
                     const real *restrict gamma_d, const real *restrict r,
                     const real *restrict q, const real *restrict gx, const real *restrict gx_d,
                     real *restrict gy, real *restrict gy_d, real *restrict ggamma_d,
                     real *restrict gbeta_d, size n, size S, size C) {
    const real one = (real)1 / (4 * S);
    for (size image = 0; image < n; image++) {
        real flat[C], along[C], flat_d[C], along_d[C];
        memset(flat, 0, sizeof flat);
        memset(along, 0, sizeof along);
        memset(flat_d, 0, sizeof flat_d);
        memset(along_d, 0, sizeof along_d);
        for (size s = 0; s < S; s++)
            for (size k = 0; k < 4; k++)
                for (size c = 0; c < C; c++) {
                    const size i = (s * 4 + k) * C + c;
                    const real z = gamma[c] * hat[i] + beta[c];
                    gy[i] = z > 0 ? gx[s * C + c] * (real)0.25 : 0;
                    gy_d[i] = z > 0 ? gx_d[s * C + c] * (real)0.25 : 0;
                }
        SUM(flat, 4 * S, C, gy[i])
        SUM(along, 4 * S, C, gy[i] * hat[i])
        SUM(flat_d, 4 * S, C, gy_d[i])
        SUM(along_d, 4 * S, C, gy_d[i] * hat[i] + gy[i] * hat_d[i])
        /* gz -> the gradient at hat is gamma gz, with tangent gamma_d gz + gamma gz_d */
        for (size c = 0; c < C; c++) {
            gbeta_d[c] += flat_d[c];
            ggamma_d[c] += along_d[c];
            flat_d[c] = (gamma_d[c] * flat[c] + gamma[c] * flat_d[c]) * one;
            along_d[c] = (gamma_d[c] * along[c] + gamma[c] * along_d[c]) * one;
            flat[c] *= gamma[c] * one;
            along[c] *= gamma[c] * one;
        }
        for (size row = 0; row < 4 * S; row++)
            for (size c = 0; c < C; c++) {
                const size i = row * C + c;
                const real g = gamma[c] * gy[i], g_d = gamma_d[c] * gy[i] + gamma[c] * gy_d[i];
                const real at = g - flat[c] - hat[i] * along[c];
                const real at_d = g_d - flat_d[c] - hat_d[i] * along[c] - hat[i] * along_d[c];
                gy[i] = r[c] * at;
                gy_d[i] = r[c] * (at_d - q[c] * at);
            }
        hat += S * 4 * C, hat_d += S * 4 * C, gy += S * 4 * C, gy_d += S * 4 * C;
        gx += S * C, gx_d += S * C, r += C, q += C;
    }
}
