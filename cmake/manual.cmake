# The manual page and the shells' completions: written by a program that links the option tables of the command line.
add_executable(qshard_manual src/cli/manual_main.c)
target_link_libraries(qshard_manual PRIVATE qshard_core)

# qshard_manual_file(kind name folder): what `qshard_manual kind` writes, installed as folder/name
function(qshard_manual_file kind name folder)
    set(path ${PROJECT_BINARY_DIR}/manual/${kind}/${name})
    add_custom_command(OUTPUT ${path}
        COMMAND ${CMAKE_COMMAND} -E make_directory ${PROJECT_BINARY_DIR}/manual/${kind}
        COMMAND qshard_manual ${kind} > ${path}
        DEPENDS qshard_manual VERBATIM)
    add_custom_target(manual_${kind} ALL DEPENDS ${path})
    install(FILES ${path} DESTINATION ${folder})
endfunction()
qshard_manual_file(man qshard.1 ${CMAKE_INSTALL_MANDIR}/man1)
qshard_manual_file(bash qshard ${CMAKE_INSTALL_DATADIR}/bash-completion/completions)
qshard_manual_file(zsh _qshard ${CMAKE_INSTALL_DATADIR}/zsh/site-functions)
