/* src/device/cuda_archs.h: which cards a build has code for. */
#include <criterion/criterion.h>

#include "device/cuda_archs.h"

static const char *const ALL = "80-real 86-real 89-real 90a-real 100-real 120-real 100-virtual";

Test(core_archs, the_default_list_covers_every_card_from_ampere_on)
{
    static const int cards[][2] = {{8, 0},  {8, 6},  {8, 7},  {8, 8},  {8, 9},  {9, 0},
                                   {10, 0}, {10, 3}, {11, 0}, {12, 0}, {12, 1}, {13, 0}};
    for (size_t i = 0; i < sizeof cards / sizeof *cards; i++) {
        cr_assert(qs_cuda_archs_cover(ALL, cards[i][0], cards[i][1]), "sm_%d%d", cards[i][0],
                  cards[i][1]);
    }
    cr_assert_not(qs_cuda_archs_cover(ALL, 7, 5));
    cr_assert_not(qs_cuda_archs_cover(ALL, 7, 0));
}

Test(core_archs, machine_code_runs_on_later_minor_versions_only)
{
    cr_assert(qs_cuda_archs_cover("80-real", 8, 9));
    cr_assert_not(qs_cuda_archs_cover("86-real", 8, 0));
    cr_assert_not(qs_cuda_archs_cover("80-real", 9, 0));
    cr_assert_not(qs_cuda_archs_cover("120-real", 13, 0));
}

Test(core_archs, code_with_an_a_runs_on_its_own_card_alone)
{
    cr_assert(qs_cuda_archs_cover("90a-real", 9, 0));
    cr_assert_not(qs_cuda_archs_cover("100a-real", 10, 3));
    cr_assert_not(qs_cuda_archs_cover("90a-virtual", 10, 0));
    cr_assert_not(qs_cuda_archs_cover("90a-real", 8, 0));
}

Test(core_archs, a_family_is_one_major_version)
{
    cr_assert(qs_cuda_archs_cover("100f-real", 10, 3));
    cr_assert(qs_cuda_archs_cover("100f", 10, 0));
    cr_assert_not(qs_cuda_archs_cover("100f", 12, 0));
}

Test(core_archs, virtual_code_runs_on_every_later_card)
{
    cr_assert(qs_cuda_archs_cover("80-virtual", 12, 0));
    cr_assert(qs_cuda_archs_cover("80", 9, 0), "no ending: both");
    cr_assert_not(qs_cuda_archs_cover("100-virtual", 9, 0));
    cr_assert_not(qs_cuda_archs_cover("", 9, 0));
    cr_assert_not(qs_cuda_archs_cover("native", 9, 0));
}
