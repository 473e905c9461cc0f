#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "fsdp/lora_gather.h"
#include "hf/safetensors.h"
#include "store/io.h"
#include "train/run_impl.h"

#define GRADIENTS "gradients" /* what tells files of --dump-grads */

qs_status qs_run_check_dumps(const qs_run *r)
{
    const char *grads = r->options->dump_grads, *order = r->options->dump_order;
    qs_status st = QS_OK;
    if (grads != NULL && r->rank == 0) {
        st = qs_io_try_file(grads, QS_ST_MARK(GRADIENTS));
    }
    if (order != NULL && r->rank == 0 && st == QS_OK) {
        st = qs_io_try_file(order, NULL);
    }
    return qs_comm_agree(r->comm, st);
}

qs_status qs_run_dump_gradient(qs_run *r, const float *shard)
{
    qs_status st = QS_OK;
    const qs_session *s = &r->session;
    const qs_lora_layout *layout = &s->on.layout;
    qs_mirror full = {0};
    QS_GOTO(qs_comm_agree(
        r->comm, qs_mirror_create(s->device, &full,
                                  (size_t)(layout->n_layers * layout->per_layer) * sizeof(float),
                                  QS_MEM_WORK)));
    QS_GOTO(qs_lora_gather(layout, &s->levels.levels, s->queue, r->trainer.exchange, shard,
                           full.device));
    QS_GOTO(qs_mirror_pull(s->queue, &full, 0, full.bytes));
    QS_GOTO(qs_queue_wait(s->queue));
    if (r->rank == 0) {
        st = qs_peft_write_tensors(r->options->dump_grads, layout, full.host, GRADIENTS);
    }
    st = qs_comm_agree(r->comm, st);
done:
    qs_mirror_destroy(s->device, &full);
    return st;
}

qs_status qs_run_dump_order(const qs_run *r)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    for (int64_t step = 0; out != NULL && step < r->sampler.steps; step++) {
        for (int64_t i = 0; i < qs_sampler_step_size(&r->sampler, step); i++) {
            int64_t number = 0;
            fprintf(out, "%s%" PRId64, i > 0 ? " " : "",
                    qs_sampler_sequence(&r->sampler, step, i, &number));
        }
        fputc('\n', out);
    }
    qs_status st = out != NULL && fclose(out) == 0
                       ? qs_io_write_file(r->options->dump_order, text, bytes)
                       : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", r->options->dump_order);
    free(text);
    return st;
}
