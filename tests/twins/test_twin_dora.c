/* DoRA's linears against the CPU: norms and gains, forward, gradients, magnitudes. The way an
 * operation takes (bordered or plain, opened or not, one block of tokens or several) must not show:
 * all meet the same limits, which are what rounding to bf16 can change: y once; xa, drop(x), g dy,
 * (g - 1) dy and s (g dy) B each; dx as in test_twin_linear.c; the product that dm is made of. Sums
 * are fp32, or fp64 on the CPU. */
#include "linear_layer.h"

/* ---- limits ---- */

/* Sizes as floats, contiguous, to be a factor of the next product. */
static float *sizes_of(int64_t rows, int64_t cols, int64_t k, ad_factor a, ad_factor b,
                       double times)
{
    double *sum = ad_limits(rows * cols);
    float *out = ad_zeros(rows * cols);
    ad_add_products(sum, rows, cols, k, a, b, times);
    for (int64_t i = 0; i < rows * cols; i++) {
        out[i] = (float)sum[i];
    }
    free(sum);
    return out;
}

/* |gain - minus| times the limits of a row, column by column. */
static void times_gains(const layer *l, double *limit, double minus)
{
    for (int64_t i = 0; i < l->c->rows * l->c->out; i++) {
        limit[i] *= fabs((double)l->gain.host[i % l->c->out] - minus);
    }
}

/* |xa| of s A drop(x) and what its own rounding and drop(x)'s can change of it, [rows, rank]. */
static float *xa_changes(const layer *l)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale;
    const double of_drop = c->dropout > 0.0F ? AD_HALF_ULP : 0.0;
    float *out = sizes_of(c->rows, c->rank, c->in, (ad_factor){l->dropped, c->in, 1},
                          (ad_factor){l->ad.a, 1, c->in}, s * (1e-6 + of_drop));
    for (int64_t i = 0; i < c->rows * c->rank; i++) {
        const float xa = qs_mat_f32(&l->xa.host)[i / c->rank * l->xa.host.stride + i % c->rank];
        out[i] += (float)(s * AD_HALF_ULP) * fabsf(xa);
    }
    return out;
}

/* y is rounded once, from fp32, unless it is fp32. */
static void check_y(const layer *l)
{
    const layer_case *c = l->c;
    const int64_t count = c->rows * c->out;
    const ad_factor w = {l->unit.host.plain, 1, c->in}, b = {l->ad.b, 1, c->rank};
    double *limit = ad_limits(count), *of_drop = ad_limits(count);
    float *xa = xa_changes(l);
    ad_add_products(limit, c->rows, c->out, c->rank, (ad_factor){xa, c->rank, 1}, b, 1.0);
    ad_add_products(limit, c->rows, c->out, c->in, ad_of(&l->x), w,
                    1e-6 + layer_weight_rounding(c));
    times_gains(l, limit, 0.0);
    if (c->dropout > 0.0F) { /* both products with W count, and drop(x) was rounded */
        ad_add_products(of_drop, c->rows, c->out, c->in, (ad_factor){l->dropped, c->in, 1}, w,
                        1e-6 + layer_weight_rounding(c) + AD_HALF_ULP);
        times_gains(l, of_drop, 1.0);
        ad_add_products(limit, c->rows, c->out, c->in, ad_of(&l->x), w,
                        1e-6 + layer_weight_rounding(c));
    }
    for (int64_t i = 0; i < count; i++) {
        limit[i] += of_drop[i] + 1e-6;
    }
    ad_add_values(limit, &l->y.host, layer_y_is_f32(c) ? 1e-6 : AD_HALF_ULP);
    layer_assert_mat(l, "y", &l->y, limit);
    free(of_drop);
    free(xa);
}

/* dy times |gain - minus|, contiguous. */
static float *gained_dy(const layer *l, float minus)
{
    float *out = ad_compact(&l->dy.host);
    for (int64_t i = 0; i < l->c->rows * l->c->out; i++) {
        out[i] *= l->gain.host[i % l->c->out] - minus;
    }
    return out;
}

/* |s (g dy) B| and what rounding g dy and the product can change of it, [rows, rank]. */
static float *work_changes(const layer *l, const float *gained)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale;
    float *out = sizes_of(c->rows, c->rank, c->out, (ad_factor){gained, c->out, 1},
                          (ad_factor){l->ad.b, c->rank, 1}, s * (1e-6 + AD_HALF_ULP));
    for (int64_t i = 0; i < c->rows * c->rank; i++) {
        const float work =
            qs_mat_f32(&l->work.host)[i / c->rank * l->work.host.stride + i % c->rank];
        out[i] += (float)(s * AD_HALF_ULP) * fabsf(work);
    }
    return out;
}

/* Without a border the adapter's part is a product of its own: rounded, and the sum before it. */
static void check_dx(const layer *l, const float *start)
{
    const layer_case *c = l->c;
    const double kept = 1.0 / (1.0 - (double)c->dropout), s = l->ad.host.scale;
    const ad_factor w = {l->unit.host.plain, c->in, 1}, a = {l->ad.a, c->in, 1};
    const double of_weight = 1e-6 + layer_weight_rounding(c);
    float *gained = gained_dy(l, 0.0F), *but_one = gained_dy(l, 1.0F);
    float *work = work_changes(l, gained);
    double *limit = ad_limits(c->rows * c->in);
    ad_add_values(limit, &l->dx.host, 2 * AD_HALF_ULP);
    ad_add_rounded_product(limit, &l->dx.host, start);
    ad_add_products(limit, c->rows, c->in, c->rank, (ad_factor){work, c->rank, 1}, a, kept);
    ad_add_products(limit, c->rows, c->in, c->rank, ad_of(&l->work), a,
                    (start != NULL ? 3 : 2) * s * kept * AD_HALF_ULP);
    if (c->dropout > 0.0F) {
        ad_add_products(limit, c->rows, c->in, c->out, ad_of(&l->dy), w, of_weight);
        /* rounded as an operand, and its product with what it is added to */
        ad_add_products(limit, c->rows, c->in, c->out, (ad_factor){but_one, c->out, 1}, w,
                        kept * (of_weight + 3 * AD_HALF_ULP));
    } else {
        ad_add_products(limit, c->rows, c->in, c->out, (ad_factor){gained, c->out, 1}, w,
                        of_weight + AD_HALF_ULP);
    }
    layer_assert_mat(l, "dx", &l->dx, limit);
    free(gained);
    free(but_one);
    free(work);
}

static void check_gradients(const layer *l)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale, of_drop = c->dropout > 0.0F ? AD_HALF_ULP : 0.0;
    const ad_factor dropped = {l->dropped, c->in, 1};
    float *gained = gained_dy(l, 0.0F), *work = work_changes(l, gained), *xa = xa_changes(l);
    double *a_limit = ad_limits(c->rank * c->in), *b_limit = ad_limits(c->out * c->rank);
    ad_add_products(a_limit, c->rank, c->in, c->rows, (ad_factor){work, 1, c->rank}, dropped, 1.0);
    ad_add_products(a_limit, c->rank, c->in, c->rows, ad_transposed(ad_of(&l->work)), dropped,
                    s * (of_drop + 1e-6));
    ad_add_products(b_limit, c->out, c->rank, c->rows, (ad_factor){gained, 1, c->out},
                    (ad_factor){xa, c->rank, 1}, 1.0);
    ad_add_products(b_limit, c->out, c->rank, c->rows, (ad_factor){gained, 1, c->out},
                    ad_of(&l->xa), s * (AD_HALF_ULP + 1e-6));
    layer_assert_vector(l, "da", &l->da, a_limit);
    layer_assert_vector(l, "db", &l->db, b_limit);
    free(gained);
    free(work);
    free(xa);
}

/* (W + s B A) drop(x) is rounded; as two products, each and their sum. */
static void check_magnitudes(const layer *l)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale, of_drop = c->dropout > 0.0F ? AD_HALF_ULP : 0.0;
    const ad_factor w = {l->unit.host.plain, 1, c->in}, b = {l->ad.b, 1, c->rank};
    const ad_factor dropped = {l->dropped, c->in, 1};
    double *z = ad_limits(c->rows * c->out), *limit = ad_limits(c->out);
    float *xa = xa_changes(l);
    ad_add_products(z, c->rows, c->out, c->rank, (ad_factor){xa, c->rank, 1}, b, 1.0);
    ad_add_products(z, c->rows, c->out, c->rank, ad_of(&l->xa), b, 2 * s * AD_HALF_ULP);
    ad_add_products(z, c->rows, c->out, c->in, dropped, w,
                    1e-6 + layer_weight_rounding(c) + of_drop);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t o = 0; o < c->out; o++) {
            double product = 0;
            for (int64_t i = 0; i < c->in; i++) {
                product +=
                    (double)l->dropped[t * c->in + i] * (double)l->unit.host.plain[o * c->in + i];
            }
            const double dy = fabs((double)qs_mat_f32(&l->dy.host)[t * l->dy.host.stride + o]);
            limit[o] += dy * (z[t * c->out + o] + (2 * AD_HALF_ULP + 1e-6) * fabs(product));
        }
    }
    for (int64_t o = 0; o < c->out; o++) {
        limit[o] = limit[o] / (double)l->norm.host[o] +
                   (1e-5 + layer_weight_rounding(c)) * fabs((double)l->dm.host[o]);
    }
    layer_assert_vector(l, "dm", &l->dm, limit);
    free(z);
    free(xa);
}

/* ---- cases ---- */

static void check_case(const tw_backend *b, const layer_case *c)
{
    layer l = layer_make(b, c, DORA);
    float *dx_start = c->dx == DX_ADD ? ad_compact(&l.dx.host) : NULL;
    layer_open(&l);
    layer_set_gains(&l);
    layer_run(&l);
    check_y(&l);
    check_gradients(&l);
    check_magnitudes(&l);
    if (c->dx != NO_DX) {
        check_dx(&l, dx_start);
    }
    layer_close(&l);
    free(dx_start);
    layer_free(&l);
}

Test(twin_dora, every_way_gives_the_same)
{
    static const layer_case cases[] = {
        {21, 72, 88, 8, 8, 0.0F, NF4, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, NF4, true, 5, 8, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, NF4, false, BORDER, 8, false, NO_RESIDUAL, DX_ADD},
        {21, 72, 88, 8, 8, 0.3F, NF4, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.3F, NF4, true, 5, 8, false, NO_RESIDUAL, DX_ADD},
        {21, 72, 88, 8, 8, 0.3F, NF4, false, BORDER, 8, false, NO_RESIDUAL, DX},
    };
    TW_CHECK_CASES(check_case, cases);
}

/* Ranks that are no whole pieces, or smaller than the border, or more than a kernel takes at once;
 * rows from one on; widths that are no multiples of 8, where borders cannot be used. */
Test(twin_dora, shapes)
{
    static const layer_case cases[] = {
        {1, 8, 8, 1, 1, 0.0F, NF4, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {17, 64, 128, 13, 13, 0.0F, NF4, true, BORDER, 8, false, NO_RESIDUAL, DX_ADD},
        {17, 64, 128, 13, 30, 0.2F, NF4, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {19, 136, 72, 64, 64, 0.0F, NF4, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {19, 136, 72, 20, 64, 0.0F, NF4, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {11, 40, 304, 100, 100, 0.0F, NF4, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {9, 45, 333, 5, 5, 0.0F, NF4, true, BORDER, 8, true, RESIDUAL, DX},
        {9, 45, 333, 70, 70, 0.1F, NF4, true, BORDER, 8, true, RESIDUAL, DX_ADD},
        {9, 64, 333, 13, 13, 0.0F, NF4, true, BORDER, 8, true, RESIDUAL, DX_ADD},
        {9, 45, 64, 8, 8, 0.4F, NF4, true, BORDER, 8, true, RESIDUAL_IS_Y, DX},
        {30, 200, 104, 16, 16, 0.0F, NF4, true, BORDER, 8, false, NO_RESIDUAL, NO_DX},
        {130, 24, 40, 4, 4, 0.0F, NF4, true, BORDER, 8, true, RESIDUAL_IS_Y, DX},
    };
    TW_CHECK_CASES(check_case, cases);
}

Test(twin_dora, bias_and_residual)
{
    static const layer_case cases[] = {
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, 8, true, NO_RESIDUAL, DX},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, 8, false, RESIDUAL, DX_ADD},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, 8, true, RESIDUAL_IS_Y, DX},
        {13, 40, 48, 4, 4, 0.5F, NF4, true, BORDER, 8, true, RESIDUAL, DX_ADD},
        {13, 40, 48, 4, 4, 0.5F, NF4, true, BORDER, 8, true, RESIDUAL_IS_Y, DX},
        {13, 40, 48, 4, 4, 0.5F, NF4, false, 5, 8, true, NO_RESIDUAL, NO_DX},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, 8, true, RESIDUAL_F32, DX},
        {13, 45, 35, 4, 4, 0.5F, NF4, true, BORDER, 8, true, RESIDUAL_IS_Y_F32, DX},
    };
    TW_CHECK_CASES(check_case, cases);
}

Test(twin_dora, weights_of_all_kinds)
{
    static const layer_case cases[] = {
        {12, 56, 72, 6, 8, 0.0F, RAW_BF16, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {12, 56, 72, 6, 8, 0.3F, RAW_BF16, false, BORDER, 8, true, RESIDUAL, DX_ADD},
        {12, 45, 35, 6, 8, 0.0F, RAW_BF16, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {12, 56, 72, 6, 8, 0.0F, RAW_F32, true, BORDER, 8, false, NO_RESIDUAL, DX},
        {12, 56, 72, 6, 8, 0.3F, NF4_F16, true, BORDER, 8, true, NO_RESIDUAL, DX},
        {12, 56, 72, 6, 8, 0.0F, NF4_PLAIN_SCALES, true, BORDER, 8, false, RESIDUAL, DX},
    };
    TW_CHECK_CASES(check_case, cases);
}

/* More tokens than pass through scratch at once: two blocks, and three. */
Test(twin_dora, blocks_of_tokens)
{
    static const layer_case cases[] = {
        {2100, 16, 24, 4, 4, 0.0F, NF4, true, BORDER, 8, true, RESIDUAL_IS_Y, DX_ADD},
        {2100, 16, 24, 3, 4, 0.25F, NF4, true, BORDER, 8, true, RESIDUAL, DX},
        {4100, 8, 16, 2, 2, 0.25F, NF4, false, 5, 8, false, NO_RESIDUAL, DX_ADD},
        {2100, 16, 24, 4, 4, 0.0F, NF4, true, BORDER, 8, true, RESIDUAL_F32, NO_DX},
        {4100, 8, 16, 2, 2, 0.25F, NF4, true, BORDER, 8, false, RESIDUAL_IS_Y_F32, NO_DX},
    };
    TW_CHECK_CASES(check_case, cases);
}
