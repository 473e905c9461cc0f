/* Writing PEFT adapter directories: complete in a temporary directory, read back with our own
 * reader, then renamed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "hf/chat_template.h"
#include "hf/safetensors.h"
#include "lora/lora_impl.h"
#include "store/io.h"
#include "store/staged.h"

enum { NAME_ROOM = 96, PATH_ROOM = QS_PATH_MAX + 64 };

/* ---- the tensors ---- */

static void add_item(qs_st_item *items, char (*names)[NAME_ROOM], int64_t at, qs_peft_naming naming,
                     int layer, int linear, const qs_lora_part *part, const float *segment)
{
    qs_lora_peft_name(names[at], NAME_ROOM, naming, layer, (qs_linear)linear, part->which);
    items[at] = (qs_st_item){
        .name = names[at],
        .dtype = QS_F32,
        .rank = part->rank,
        .shape = {part->shape[0], part->shape[1]},
        .data = segment + part->at,
    };
}

qs_status qs_peft_write_tensors(const char *path, const qs_lora_layout *layout, const float *vector,
                                const char *mark)
{
    size_t most = (size_t)layout->n_layers * QS_LORA_PARTS_MAX * QS_LINEAR_COUNT;
    qs_st_item *items = calloc(most, sizeof *items);
    char(*names)[NAME_ROOM] = calloc(most, sizeof *names);
    int64_t count = 0;
    qs_status st = QS_OK;
    if (!items || !names) {
        QS_GOTO(QS_FAIL(QS_ERR_MEMORY, "%s: no memory for %zu names", path, most));
    }
    for (int layer = 0; layer < layout->n_layers; layer++) {
        const float *segment = vector + layer * layout->per_layer;
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            qs_lora_part parts[QS_LORA_PARTS_MAX];
            const int n = qs_lora_parts(layout, i, parts);
            for (int k = 0; k < n; k++) {
                add_item(items, names, count++, layout->naming, layer, i, &parts[k], segment);
            }
        }
    }
    QS_GOTO(qs_st_write(path, items, count, mark));
done:
    free(items);
    free(names);
    return st;
}

/* ---- the texts ---- */

static qs_status write_text(const char *dir, const char *name, const char *text)
{
    char path[PATH_ROOM + 32];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return text ? qs_io_write_new(path, text, strlen(text))
                : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
}

/* A quoted YAML scalar. */
static void quote(FILE *out, const char *text)
{
    fputc('"', out);
    for (const char *p = text; *p; p++) {
        if (*p == '"' || *p == '\\') {
            fputc('\\', out);
        }
        fputc((unsigned char)*p < 0x20 ? ' ' : *p, out);
    }
    fputc('"', out);
}

static char *model_card(const qs_config *cfg, qs_peft_naming naming, const char *base_name)
{
    /* the class that has modules of these names */
    const char *class_name =
        naming == QS_PEFT_PLAIN ? "AutoModelForCausalLM" : "AutoModelForImageTextToText";
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    if (!out) {
        return NULL;
    }
    fputs("---\nbase_model: ", out);
    quote(out, base_name);
    fputs("\nlibrary_name: peft\ntags:\n- lora\n- qlora\n---\n\n", out);
    fprintf(out,
            "# LoRA adapter\n\nRank %lld, alpha %g%s%s, trained with qshard on an NF4 base%s.\n\n"
            "```python\nfrom peft import PeftModel\nfrom transformers import "
            "%s\n\nbase = %s.from_pretrained(",
            (long long)cfg->lora.rank, cfg->lora.alpha,
            cfg->lora.rslora ? " (rank-stabilized)" : "", cfg->lora.dora ? ", DoRA" : "",
            naming == QS_PEFT_PLAIN ? "" : ", the text part of the model", class_name, class_name);
    quote(out, base_name);
    fputs(", dtype=\"bfloat16\")\n"
          "model = PeftModel.from_pretrained(base, \"path/of/this/directory\")\n```\n",
          out);
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

/* ---- the directory ---- */

static qs_status write_files(const char *dir, const qs_lora_layout *layout, const qs_config *cfg,
                             const char *base_name, const char *base_sha256,
                             const char *chat_template, const float *vector)
{
    char path[PATH_ROOM + 32];
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
    QS_TRY(qs_peft_write_tensors(path, layout, vector, NULL));
    char *text = qs_peft_config_text(cfg, layout, base_name);
    qs_status st = write_text(dir, "adapter_config.json", text);
    free(text);
    QS_TRY(st);
    text = model_card(cfg, layout->naming, base_name);
    st = write_text(dir, "README.md", text);
    free(text);
    QS_TRY(st);
    if (base_sha256 != NULL && qs_peft_is_hash(base_sha256)) {
        text = qs_peft_origin_text(base_sha256);
        st = write_text(dir, QS_PEFT_ORIGIN_NAME, text);
        free(text);
        QS_TRY(st);
    }
    return chat_template ? write_text(dir, QS_CHAT_TEMPLATE_NAME, chat_template) : QS_OK;
}

/* What our own parser makes of it must be what was to be written, bit by bit. */
static qs_status read_back(const char *dir, const qs_lora_layout *layout, const float *vector)
{
    qs_status st = QS_OK;
    qs_peft *peft = NULL;
    float *segment = NULL;
    QS_GOTO(QS_ALLOC(&segment, layout->per_layer, QS_MEM_WORK));
    QS_GOTO(qs_peft_open(&peft, dir, layout));
    for (int layer = 0; layer < layout->n_layers; layer++) {
        QS_GOTO(qs_peft_read_layer(peft, layer, segment));
        const float *wanted = vector + layer * layout->per_layer;
        if (memcmp(segment, wanted, (size_t)layout->used * sizeof *segment) != 0) {
            QS_GOTO(QS_FAIL(QS_ERR_IO_VERIFY, "%s: layer %d reads back differently", dir, layer));
        }
    }
done:
    qs_peft_close(peft);
    qs_mem_free(segment);
    return st;
}

static qs_status fill_directory(const char *dir, const qs_lora_layout *layout, const qs_config *cfg,
                                const char *base_name, const char *base_sha256,
                                const char *chat_template, const float *vector)
{
    QS_TRY(write_files(dir, layout, cfg, base_name, base_sha256, chat_template, vector));
    QS_TRY(read_back(dir, layout, vector));
    return qs_io_fsync_dir(dir);
}

qs_status qs_peft_write(const char *dir, const qs_lora_layout *layout, const qs_config *cfg,
                        const char *base_name, const char *base_sha256, const char *chat_template,
                        const float *vector)
{
    qs_staged out;
    qs_status st = QS_OK;
    QS_TRY(qs_staged_name(&out, dir, NULL));
    QS_GOTO(qs_staged_begin(&out, 0));
    QS_GOTO(qs_staged_make_dir(&out));
    QS_GOTO(fill_directory(out.temp, layout, cfg, base_name, base_sha256, chat_template, vector));
    st = qs_staged_publish(&out);
done:
    qs_staged_end(&out, st);
    return st;
}
